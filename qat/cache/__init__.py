"""Teacher caches, to be read in this order.

`config`, `manifest` (identity), `codec` (a position as bytes), `build`, `read`, `seed_format`
(the seeds' own caches).
"""
