"""Flags of `qat demo`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Run the whole path on SmolLM2-135M: teacher, cache, 4 bits, 2 bits, training, export."""

    output_dir: Path = Path("runs/demo")
    """Where students, run and export go."""
    model_dir: Path = Path("models/smollm2-135m")
    """Where the teacher goes."""
    cache_dir: Path = Path("caches")
    """Where the cache goes."""
    max_steps: int = 64
    """Training steps of 512 tokens."""
