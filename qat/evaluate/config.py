"""Flags of `qat evaluate`."""

from dataclasses import dataclass
from pathlib import Path

from qat.runtime.config import PlaceConfig, require_at_least


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(PlaceConfig):
    """Measure a student on a cache's held-out split, or on any text against a live teacher."""

    checkpoint: str
    """Native folder, run folder (its best), `.pt` file with its config.json, a model folder, or
    any program's `.gguf` file."""
    model_id: str | None = None
    """Full-precision model of a `.pt` checkpoint: folder or hub name; the one its config names. A
    `.gguf` file needs it."""
    cache_dir: Path | None = None
    """Teacher cache to measure on: its held-out split."""
    teacher: str | None = None
    """Full-precision model to compare with: kl_nats is then over its whole vocabulary, also on a
    cache that keeps a part of it."""
    text: Path | None = None
    """Plain text file to measure on."""
    seq_len: int = 64
    """Tokens of a block of --text."""
    num_sequences: int | None = None
    """Sequences or blocks at most; all when not given."""
    batch_size: int = 16
    """Sequences of a forward pass."""

    def __post_init__(self) -> None:
        if (self.cache_dir is None) == (self.text is None):
            raise ValueError("give one of --cache-dir and --text to measure on")
        require_at_least(1, self, "num_sequences", "batch_size")
        require_at_least(2, self, "seq_len")
