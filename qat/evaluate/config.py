"""Flags of `qat evaluate`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
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
    dtype: str = "auto"
    """Compute dtype: auto, fp32, bf16 or fp16."""
    device: str = "auto"
    """auto, cpu, cuda, mps, xla or tpu."""

    def __post_init__(self) -> None:
        if (self.cache_dir is None) == (self.text is None):
            raise ValueError("give one of --cache-dir and --text to measure on")
        if self.num_sequences is not None and self.num_sequences < 1:
            raise ValueError(
                f"--num-sequences {self.num_sequences} must be 1 or more; leave it out for all"
            )
        if self.seq_len < 2 or self.batch_size < 1:
            raise ValueError(
                f"--seq-len {self.seq_len} must be 2 or more, --batch-size {self.batch_size} 1"
            )
