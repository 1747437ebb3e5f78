"""Held-out numbers: `kl`, then `on_cache`, `on_text`, `on_tokens`, `windows`; lm-eval's in `tasks`.

`generate` gives answers.
"""
