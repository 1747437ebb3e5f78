"""The doors: one module a command. `door.py` parses and reports; the rest wire acts together."""
