"""What a user does, as typed functions: the only place that wires the layers below."""
