"""Held-out numbers: `kl`, then `on_cache` and `on_text`; answers: `generate`."""
