"""What several commands are told alike; imports no torch, so that help is quick."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceConfig:
    """Where to compute, and in what."""

    dtype: str = "auto"
    """Compute dtype: auto, fp32, bf16 or fp16."""
    device: str = "auto"
    """auto, cpu, cuda, mps, xla or tpu."""


def require_at_least(least: int, config: object, *names: str, group: str = "") -> None:
    """Refuse numbers of a config below the least one, naming the flag; None is none given."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            flag = f"{group}.{name}".lstrip(".").replace("_", "-")
            raise ValueError(f"--{flag} {value} must be {least} or more")


def require_at_most(most: int, config: object, *names: str) -> None:
    """Refuse numbers of a config above the largest one, naming the flag."""
    for name in names:
        if (value := getattr(config, name)) > most:
            raise ValueError(
                f"--{name.replace('_', '-')} {value} must be {most} or less; give less"
            )


def require_seed(config: object) -> None:
    """Refuse a seed that not every generator takes: torch has signed ones, numpy no negative."""
    require_at_least(0, config, "seed")
    require_at_most(2**63 - 1, config, "seed")


def split_list(values: Iterable[str]) -> tuple[str, ...]:
    """Return values that a flag was given with spaces or commas between; a path stays whole."""
    found: list[str] = []
    for value in values:
        paths = (value, value.partition("=")[2] or value)
        is_whole = any(Path(path).exists() for path in paths)
        found += [value] if is_whole else [part for part in value.split(",") if part]
    return tuple(found)
