"""Which of the processes that torchrun started this is; imports no torch, so that help is quick."""

import os

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR")


def is_launched() -> bool:
    """Return whether the environment is that of torchrun's processes."""
    return all(name in os.environ for name in NAMES)


def num_processes() -> int:
    """Return how many processes work together."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def rank() -> int:
    """Return which of them this one is, from 0."""
    return int(os.environ["RANK"]) if is_launched() else 0


def local_rank() -> int:
    """Return which of those on this machine this one is, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0)) if is_launched() else 0


def num_local_processes() -> int:
    """Return how many of them are on this machine; all where the launcher does not tell."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_processes())) if is_launched() else 1


def is_first() -> bool:
    """Return whether this process writes, tracks and speaks for all."""
    return rank() == 0
