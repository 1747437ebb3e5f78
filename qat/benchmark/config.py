"""Flags of `qat bench`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Case = Literal["plain", "fake-quant", "rank-by-rank", "formed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Measure training steps against plain fine-tuning, each case in a process of its own."""

    model_id: str = "models/smollm2-135m"
    """Model whose shape is measured; weights do not matter."""
    tokens_per_step: int = 2048
    """Tokens of a step in the comparison with plain fine-tuning."""
    seq_len: int = 64
    """Tokens of a sequence."""
    steps: int = 3
    """Timed steps of a process, after one that warms up."""
    repeats: int = 2
    """Processes of each case, in turn; the median of all their steps counts."""
    case: Case | None = None
    """Measure one case in this process: what the others are started with."""
    dtype: str = "auto"
    """Compute dtype: auto, fp32, bf16 or fp16."""
    device: str = "auto"
    """auto, cpu, cuda, mps, xla or tpu."""

    def __post_init__(self) -> None:
        if self.tokens_per_step % self.seq_len:
            raise ValueError(
                f"--tokens-per-step {self.tokens_per_step} must be a multiple of --seq-len "
                f"{self.seq_len}"
            )
        if not Path(self.model_id).is_dir():
            raise ValueError(
                f"--model-id {self.model_id} is no folder; run `qat fetch smollm2 --output-dir "
                "models/smollm2-135m` or name one"
            )
