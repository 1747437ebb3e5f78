"""Values that a weight can take: `scalar`, `codebook`, `scales`, `blocks`, `packing`."""
