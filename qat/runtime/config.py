"""What several commands are told alike; imports no torch, so that help is quick."""

from dataclasses import dataclass


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
