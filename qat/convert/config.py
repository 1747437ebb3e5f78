"""Flags of the commands that make students."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qat.quant.scheme import CodebookKind, LayerScheme

Fit = Literal["hessian", "moments"]
# Where more no longer pays: a second moment is known from few tokens, a Hessian from many.
CALIBRATION_TOKENS = {"hessian": 32768, "moments": 4096}


@dataclass(frozen=True, kw_only=True, slots=True)
class InitStudentConfig:
    """Quantize a full-precision model: codebook and scales fitted to weights and activations."""

    model: str
    """Hugging Face folder or hub name of the full-precision model."""
    output: Path
    """Folder of the student."""
    scheme: str = "q4a4"
    """MLP bits and attention bits; _gN sets weights per scale, _rN low-rank scales, _int takes
    the integer grids of runtimes: q2a4_g64, q2a4_int."""
    cache_dir: Path | None = None
    """Teacher cache: calibrates the fit, measures the student."""
    fit: Fit = "hessian"
    """hessian: codes with error feedback against all inputs, block by block, each block fed by the
    quantized ones before it. moments: each input's mean square, one pass; several times quicker."""
    calibration_sequences: int | None = None
    """Training sequences of the cache that calibrate; when not given, as many as make 32768 tokens
    for hessian, 4096 for moments."""
    eval: bool = True
    """Measure the student on the cache's held-out split."""
    dtype: str = "auto"
    """Compute dtype: auto, fp32, bf16 or fp16."""
    device: str = "auto"
    """auto, cpu, cuda, mps, xla or tpu."""

    def __post_init__(self) -> None:
        if self.calibration_sequences is not None:
            require_positive("--calibration-sequences", self.calibration_sequences)

    def num_calibration_sequences(self, seq_len: int) -> int:
        """Return how many sequences of `seq_len` tokens calibrate."""
        given = self.calibration_sequences
        return default_sequences(self.fit, seq_len) if given is None else given


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertQ4ToQ2Config:
    """Make a student with 2-bit MLP layers out of a 4-bit one; attention keeps its 4 bits."""

    q4_checkpoint: Path
    """The 4-bit student."""
    output: Path
    """Folder of the 2-bit student."""
    model_id: str | None = None
    """Full-precision model to fit to; the one that the 4-bit student names when not given."""
    q2_mlp_bits: int = 2
    """Bits of MLP weights after the conversion."""
    q2_mlp_group_size: int | None = None
    """MLP weights of a row that share a scale; 32, with an int codebook of 2 bits 64."""
    q2_mlp_codebook: CodebookKind = "learned"
    """learned, or a fixed one: int is the grid of runtimes (GGUF Q2_0), with scales of either
    sign."""
    q2_mlp_rank: int = 0
    """Rank of low-rank MLP scales; 0 = one scale per group."""
    eval: bool = False
    """Measure the student on the cache's held-out split."""
    cache_dir: Path | None = None
    """Teacher cache: calibrates the fit, measures the student."""
    fit: Fit = "hessian"
    """hessian: codes with error feedback against all inputs, block by block, each block fed by the
    quantized ones before it. moments: each input's mean square, one pass; several times quicker."""
    calibration_sequences: int | None = None
    """Training sequences of the cache that calibrate; when not given, as many as make 32768 tokens
    for hessian, 4096 for moments."""
    dtype: str = "auto"
    """Compute dtype: auto, fp32, bf16 or fp16."""
    device: str = "auto"
    """auto, cpu, cuda, mps, xla or tpu."""

    def __post_init__(self) -> None:
        if self.calibration_sequences is not None:
            require_positive("--calibration-sequences", self.calibration_sequences)
        if self.eval and self.cache_dir is None:
            raise ValueError("--eval needs a cache to measure on; add --cache-dir caches/NAME")
        if self.output.resolve() == self.q4_checkpoint.resolve():
            raise ValueError(f"--output {self.output} is the 4-bit student; name another folder")
        LayerScheme(
            bits=self.q2_mlp_bits,
            group_size=self.q2_mlp_group_size or 0,
            rank=self.q2_mlp_rank,
        )

    def num_calibration_sequences(self, seq_len: int) -> int:
        """Return how many sequences of `seq_len` tokens calibrate."""
        given = self.calibration_sequences
        return default_sequences(self.fit, seq_len) if given is None else given


def require_positive(flag: str, value: int) -> None:
    """Refuse a count below one."""
    if value < 1:
        raise ValueError(f"{flag} {value} must be at least 1")


def default_sequences(fit: Fit, seq_len: int) -> int:
    """Return how many sequences of `seq_len` tokens are enough for a fit."""
    return max(1, CALIBRATION_TOKENS[fit] // seq_len)
