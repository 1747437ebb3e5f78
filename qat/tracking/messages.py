"""Messages for people go to the logger `qat`; standard output is for results as JSON.

A command shows them on standard error: of several processes the first one's, and the errors of any.
A program that uses the Python API decides for itself, for instance with
`logging.basicConfig(level=logging.INFO)`.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from qat.runtime.launch import is_first

LOGGER = logging.getLogger("qat")


def say(text: str) -> None:
    """Log a message at level INFO."""
    LOGGER.info(text)


@contextmanager
def messages_on_standard_error() -> Iterator[None]:
    """Show messages of level INFO and above within the block, once each."""
    if not is_first():
        os.environ["TQDM_DISABLE"] = "1"  # read where tqdm is imported
    handler, level, propagate = logging.StreamHandler(), LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO if is_first() else logging.ERROR)
    LOGGER.propagate = False
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate
