"""Lines for people, on standard error; standard output is for JSON."""

import sys


def say(text: str) -> None:
    """Print a line for people."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201 the one place that speaks
