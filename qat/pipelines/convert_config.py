"""What `qat convert` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from qat.pipelines.quantize_config import Fit, default_sequences, require_other, require_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Move a student onto another plan, such as the grids of a runtime, and tell the cost."""

    checkpoint: Path
    """The student: native folder, run folder (its best) or `.pt` file with its config.json."""
    plan: Annotated[str, tyro.conf.arg(aliases=("--scheme",))]
    """Of the new student, as `qat init-student` takes it: deploy, gguf:q2_0+gguf:q4_0, q2a4."""
    output: Path
    """Folder of the new student."""
    model_id: str | None = None
    """Full-precision model of a `.pt` checkpoint; the one that config.json names when not given."""
    cache_dir: Path | None = None
    """Teacher cache: calibrates the fit, measures the student before and after."""
    fit: Fit = "hessian"
    """hessian: codes with error feedback against all inputs, block by block. guided: the same,
    tokens counted by how strongly they move the end loss. moments: each input's mean square, one
    pass; several times quicker. Without a cache every weight counts alike."""
    calibration_sequences: int | None = None
    """Training sequences of the cache that calibrate; when not given, as many as make 32768 tokens,
    for moments 4096."""
    dtype: str = "auto"
    """Compute dtype: auto, fp32, bf16 or fp16."""
    device: str = "auto"
    """auto, cpu, cuda, mps, xla or tpu."""

    def __post_init__(self) -> None:
        """Refuse a count below one, an output that is the input."""
        require_other("--checkpoint", self.checkpoint, self.output)
        if self.calibration_sequences is not None:
            require_positive("--calibration-sequences", self.calibration_sequences)

    def num_calibration_sequences(self, seq_len: int) -> int:
        """Return how many sequences of `seq_len` tokens calibrate."""
        given = self.calibration_sequences
        return default_sequences(self.fit, seq_len) if given is None else given
