"""Values that weights can take, and the bytes of them.

`scalar` and `vectors` are grids, `codebook` fits values; `scales` and `super_blocks` multiply them;
`blocks` (of GGUF types) and `packing` are bytes.
"""
