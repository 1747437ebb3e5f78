"""Low-bit weights: `scheme`, `grid`, `codebook`, `scales`, `fit`, `ste`, `packing`."""
