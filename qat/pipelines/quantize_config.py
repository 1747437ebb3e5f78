"""Flags of the commands that plan and make students."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qat.runtime.config import PlaceConfig, require_at_least
from qat.storage.addresses import TAKES_ADDRESS

CodebookKind = Literal["learned", "uniform", "balanced", "int", "iq4_nl"]
Fit = Literal["hessian", "moments"]
# Where more no longer pays: a second moment is known from few tokens, a Hessian from many.
CALIBRATION_TOKENS = {"hessian": 32768, "moments": 4096}
CALIBRATION_BATCH = 16  # sequences of a forward pass
SEED_SUFFIX = ".pt"
SEED_MLP_RANK, SEED_ATTENTION_RANK = 32, 8  # of the seeds' preset q2a4, which their trainer takes


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig(PlaceConfig):
    """How weights are fitted, and where."""

    output: Path
    """Folder of the student."""
    cache_dir: Path | None = field(default=None, metadata=TAKES_ADDRESS)
    """Teacher cache: calibrates the fit, measures the student. Without one every weight counts
    alike."""
    fit: Fit = "hessian"
    """hessian: codes with error feedback against all inputs, block by block, each block fed by the
    quantized ones before it. moments: each input's mean square, one pass; several times quicker."""
    calibration_sequences: int | None = None
    """Sequences of the cache's text that calibrate; when not given, as many as make 32768 tokens,
    for moments 4096."""
    turns: bool = True
    """Of hessian: fit the outputs of a linear in turns, so that later ones make up for errors of
    earlier ones, where gradients on one half of the text say that it pays on the other. Up to a
    tenth less KL at 2 to 4 bits; on little text for up to two and a half times the time. Rows of a
    head are then fitted in groups of tokens that are likely after alike states."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "calibration_sequences")

    def num_calibration_sequences(self, seq_len: int) -> int:
        """Return how many sequences of `seq_len` tokens calibrate."""
        if self.calibration_sequences is not None:
            return self.calibration_sequences
        return max(1, CALIBRATION_TOKENS[self.fit] // seq_len)


@dataclass(frozen=True, kw_only=True, slots=True)
class InitStudentConfig(FitConfig):
    """Quantize a full-precision model: codebook and scales fitted to weights and activations."""

    model: str
    """Hugging Face folder or hub name of the full-precision model."""
    plan: Annotated[str, tyro.conf.arg(aliases=("--scheme",))] = "q4a4"
    """The format of every tensor: a preset (q2a4, q4a4_r32, deploy), formats of MLP and attention
    joined by a plus (gguf:q2_0+gguf:q4_0), rules (q2a4, embed=int4-g32, *.down_proj=lut3-g32), or
    a file that `qat plan` wrote. `qat plan` shows what it comes to."""
    sweeps: int = 2
    """Rounds of scales, codebooks and codes after the first codes, of the fit against all inputs:
    the second lowers the error by a hundredth in a quarter of the time."""
    eval: bool = True
    """Measure the student on the cache's held-out split."""

    def __post_init__(self) -> None:
        FitConfig.__post_init__(self)
        require_at_least(0, self, "sweeps")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig(FitConfig):
    """Move a student onto another plan, such as the grids of a runtime, and tell the cost."""

    checkpoint: Path
    """The student: native folder, run folder (its best) or `.pt` file with its config.json."""
    plan: Annotated[str, tyro.conf.arg(aliases=("--scheme",))]
    """Of the new student, as `qat init-student` takes it: deploy, gguf:q2_0+gguf:q4_0, q2a4."""
    model_id: str | None = None
    """Full-precision model of a `.pt` checkpoint; the one that config.json names when not given."""

    def __post_init__(self) -> None:
        FitConfig.__post_init__(self)
        require_other("--checkpoint", self.checkpoint, self.output)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertQ4ToQ2Config(FitConfig):
    """Make a student with 2-bit MLP layers out of a 4-bit one; attention keeps its 4 bits."""

    q4_checkpoint: Path
    """The 4-bit student: native folder, run folder, `.pt` file with its config.json, archive."""
    output: Path
    """Folder of the 2-bit student; a name ending in .pt is written in the seeds' form."""
    model_id: str | None = None
    """Full-precision model; the one that the 4-bit student names when not given. Weights are fitted
    to the student's latent ones where it has them, else to this model's."""
    q4_rank: int | None = None
    """Rank of the 4-bit student's scales, as told to the seeds' script; read from the file."""
    q2_mlp_lut_size: int = 4
    """Values in the codebook of MLP weights after the conversion: 4 is 2 bits."""
    q2_mlp_group_size: int | None = None
    """MLP weights of a row that share a scale; 32, with an int codebook of 2 bits 64."""
    q2_mlp_codebook: CodebookKind = "learned"
    """learned, or a fixed one: int is the grid of runtimes (GGUF Q2_0), with scales of either
    sign."""
    q2_mlp_rank: int | None = None
    """Rank of low-rank MLP scales, 0 = one scale per group; 0, for an output in the seeds' form 32
    unless a group size is given."""
    q2_attn_lut_size: int | None = None
    """Values in the codebook of attention weights; those of the 4-bit student when not given."""
    q2_attn_rank: int | None = None
    """Rank of attention scales; a larger one than the 4-bit student's changes no weight. The
    student's own, for an output in the seeds' form 8 if that is larger."""
    eval: bool = False
    """Measure the student on the cache's held-out split."""

    def __post_init__(self) -> None:
        FitConfig.__post_init__(self)
        if self.eval and self.cache_dir is None:
            raise ValueError("--eval needs a cache to measure on; add --cache-dir caches/NAME")
        require_other("--q4-checkpoint", self.q4_checkpoint, self.output)
        require_at_least(0, self, "q2_mlp_group_size", "q2_mlp_rank")
        if self.q2_attn_lut_size is not None:
            bits_of_size("--q2-attn-lut-size", self.q2_attn_lut_size)
        require_at_least(1, self, "q2_attn_rank", "q4_rank")

    @property
    def is_seed_form(self) -> bool:
        """Whether the output is a file of the seeds' form."""
        return self.output.suffix == SEED_SUFFIX

    @property
    def mlp_bits(self) -> int:
        """Bits of MLP weights after the conversion."""
        return bits_of_size("--q2-mlp-lut-size", self.q2_mlp_lut_size)

    @property
    def mlp_rank(self) -> int:
        """Rank of MLP scales after the conversion; 0 = one scale per group."""
        if self.q2_mlp_rank is not None:
            return self.q2_mlp_rank
        has_groups = self.q2_mlp_group_size is not None or self.q2_mlp_codebook == "int"
        return SEED_MLP_RANK if self.is_seed_form and not has_groups else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactConfig(PlaceConfig):
    """What changes a student without a fit: where its parts are, and how it is measured."""

    output: Path
    """Folder of the student; a name ending in .pt is written in the seeds' form."""
    model_id: str | None = None
    """Full-precision model of a `.pt` checkpoint; the one that config.json names when not given."""
    cache_dir: Path | None = field(default=None, metadata=TAKES_ADDRESS)
    """Teacher cache: measures the student before and after."""
    dtype: str = "fp32"
    """Compute dtype of measuring: fp32, bf16, fp16 or auto; others than fp32 hide the cost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertV1ToV2Config(ExactConfig):
    """Remove the floor of the scales of a student of the seeds' first form ("V1").

    Weights whose scale lies above the floor stay as they are. Those below it are as good as zero
    and become what the second form has nearest; their number and cost are reported.
    """

    v1_checkpoint: Path
    """The student: `.pt` file with its config.json, a folder or archive with one."""

    def __post_init__(self) -> None:
        require_other("--v1-checkpoint", self.v1_checkpoint, self.output)


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapFp16Config(ExactConfig):
    """Round every stored number of a student to float16: scales, codebooks, dense parts."""

    checkpoint: Path
    """The student: native folder, run folder (its best) or `.pt` file with its config.json."""

    def __post_init__(self) -> None:
        require_other("--checkpoint", self.checkpoint, self.output)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig(PlaceConfig):
    """Show what a plan gives each tensor of a model, and the bytes of the file that it makes.

    Reads the model's config only, never its weights.
    """

    model: str
    """Hugging Face folder or hub name of the full-precision model, or a shape of `qat pretrain`,
    such as kisoku-3.2b."""
    plan: str = "q4a4"
    """A preset (q2a4, q4a4_r32, deploy), formats of MLP and attention joined by a plus
    (gguf:q2_0+gguf:q4_0), rules (q2a4, embed=int4-g32, layers.0.*=gguf:q8_0), or a JSON file. Rules
    are PATTERN=FORMAT joined by commas, the last that matches a tensor decides; patterns are mlp,
    attention, embed, head, linears, all, or shell patterns for parameter names."""
    to: Literal["gguf", "tensors"] = "tensors"
    """gguf: file_bytes is that of the GGUF file, tokenizer and keys included. tensors: of all
    tensors together."""
    save: Path | None = None
    """File to write the plan to, as JSON that --plan takes."""
    memory: bool = False
    """Predict as well the most memory that each command holds, on --device and in --dtype."""
    batch_size: int = 8
    """Of --memory: sequences of a micro-batch of training, of all processes."""
    seq_len: int = 64
    """Of --memory: tokens of a sequence."""
    processes: int = 1
    """Of --memory: devices that train together, a process each."""
    tokens: float | None = None
    """Predict as well the hours and the memory of training on so many tokens (1e9, say), on common
    accelerators; read with --batch-size and --seq-len."""
    mfu: float = 0.4
    """Of --tokens: share of a device's peak that training reaches."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "batch_size", "seq_len", "processes", "tokens")
        if self.tokens is not None and not math.isfinite(self.tokens):
            raise ValueError(f"--tokens {self.tokens} is no count; give one such as 1e9")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"--mfu {self.mfu} is a share; give one above 0, 1 at most")


def require_other(flag: str, source: Path, output: Path) -> None:
    """Refuse an output that is the input."""
    if output.resolve() == source.resolve():
        raise ValueError(f"--output {output} is {flag}; name another file or folder")


def bits_of_size(flag: str, size: int) -> int:
    """Return the bits per index of a codebook of so many values."""
    bits = size.bit_length() - 1
    if not 2 <= bits <= 8 or size != 2**bits:
        raise ValueError(f"{flag} {size} is not one of 4, 8, .. 256; 4 is 2 bits, 16 is 4 bits")
    return bits
