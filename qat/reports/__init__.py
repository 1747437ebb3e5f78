"""Markdown, PNG and HTML from records: `compare`, `log`, `model_card`, `benchmark`."""
