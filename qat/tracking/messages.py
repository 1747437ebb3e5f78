"""Messages for people go to the logger `qat`; standard output is for results as JSON.

A command shows them on standard error. A program that uses the Python API decides for itself, for
instance with `logging.basicConfig(level=logging.INFO)`.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = logging.getLogger("qat")


def say(text: str) -> None:
    """Log a message at level INFO."""
    LOGGER.info(text)


@contextmanager
def messages_on_standard_error() -> Iterator[None]:
    """Show messages of level INFO and above within the block, once each."""
    handler, level, propagate = logging.StreamHandler(), LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate
