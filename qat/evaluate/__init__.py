"""Held-out numbers: `kl` on a cache, `perplexity` on a text, `generate` answers."""
