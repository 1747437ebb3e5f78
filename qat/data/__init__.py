"""Text to blocks of token ids: `records` reads files, `text` renders and packs."""
