"""What inputs a layer sees: `statistics` of activations, a walk by `decoder_layers`."""
