"""Text to blocks of token ids, in this order: `records`, `chat`, `text`, `blocks`."""
