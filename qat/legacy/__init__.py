"""The seeds' file forms: checkpoints V1 and V2, caches, and their conversions."""
