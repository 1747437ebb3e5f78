"""Values that weights can take: `scalar` grids, `codebook`, `scales`, GGUF `blocks`, `packing`."""
