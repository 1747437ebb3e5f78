"""What inputs a layer sees: `statistics` of activations."""
