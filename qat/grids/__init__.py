"""Values that weights can take, and the bytes of them.

`scalar` and `vectors` are grids, `codebook` fits values; `scales` and `super_blocks` multiply them,
`search` finds them; `blocks` (of GGUF types), `block_bodies` and `packing` are bytes.
"""
