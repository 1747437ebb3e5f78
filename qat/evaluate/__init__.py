"""Held-out numbers: `kl`, then `on_cache`, `on_text`, `on_tokens`, `windows`.

`generate` gives answers.
"""
