"""Text to blocks of token ids, in this order: `records`, `chat`, `text`, `blocks`.

For a model that does not exist yet: `vocabulary`, then `token_shards`, `token_writer` and
`token_dataset`.
"""
