"""Flags of `qat bench` and `qat benchmark`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qat.runtime.config import PlaceConfig, require_at_least
from qat.storage.addresses import TAKES_ADDRESS

DEFAULT_MODEL = "models/smollm2-135m"
DEFAULT_LENGTH = 64
GB = 10**9
Case = Literal["plain", "fake-quant", "rank-by-rank", "formed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig(PlaceConfig):
    """Measure what training, a cache and a conversion cost, each in a process of its own.

    Steps are compared with plain fine-tuning, a cache with the teacher's bare forward pass.
    """

    model_id: str = DEFAULT_MODEL
    """Model whose shape is measured; weights do not matter."""
    tokens_per_step: int = 2048
    """Tokens of a step in the comparison with plain fine-tuning."""
    seq_len: int = DEFAULT_LENGTH
    """Tokens of a sequence."""
    steps: int = 3
    """Timed steps of a process, after one that warms up."""
    repeats: int = 2
    """Processes of each case, in turn; the median of all their steps counts."""
    data: Path = Path("speedrun/data/instructions.jsonl")
    """Text of the cache that is built, which calibrates the conversion."""
    num_sequences: int = 512
    """Sequences of that cache."""
    case: Case | None = None
    """Measure one case in this process: what the others are started with."""

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
        if not self.data.is_file():
            raise ValueError(f"--data {self.data} is no file; name a text or jsonl file")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkConfig(PlaceConfig):
    """Measure training steps by batch size, and find the largest batch that fits.

    Every batch runs in a process of its own: steps, one evaluation, one state to resume from.
    Measured batches are kept, so the same command resumes where it was stopped.
    """

    cache_dir: Path | None = field(default=None, metadata=TAKES_ADDRESS)
    """Teacher cache whose sequences are trained on; random tokens when not given."""
    find_max_batch: bool = False
    """Search the largest batch that fits, in place of --batch-sizes."""
    batch_sizes: str = "8,16"
    """Sequences of a step, sizes joined by commas."""
    steps: int = 3
    """Timed steps of a batch, after two that warm up."""
    mode: Literal["mlp", "e2e"] = "mlp"
    """Train MLP layers only, or attention layers as well."""
    seq_len: int | None = None
    """Tokens of a sequence; the cache's, or 64 without one, when not given."""
    model_id: str | None = None
    """Full-precision model whose shape is measured; when not given the cache's teacher, or
    SmolLM2-135M without a cache."""
    load_model: str | None = None
    """Student to measure; --model-id rounded to the grid when not given."""
    save_model: Path | None = None
    """Where to write the student that was made, for --load-model."""
    skip_baseline: bool = False
    """Leave out the steps that keep all activations."""
    gradient_checkpointing: bool = True
    """Measure steps with gradient checkpointing as well."""
    processes: int = 1
    """Processes that share each batch, on CUDA one to a GPU; torchrun starts them anew for each."""
    shard: bool = False
    """They hold some rows of every quantized weight each, as with `qat train --shard`."""
    memory_limit: float | None = None
    """GB (10**9 bytes) that a batch may hold: of a GPU's memory, else resident in the host's. Of
    several processes each may."""
    probe_seconds: float = 3600.0
    """Longest that one batch may take."""
    output_dir: Path | None = None
    """Folder of measured batches, plot and log entry; runs/benchmark_KEY when not given, KEY
    standing for device, model, dtype, length, mode, versions and limits."""
    probe: int | None = None
    """Measure one batch size in this process: what the others are started with; 0 describes."""

    def __post_init__(self) -> None:
        if not all(size.isdigit() and int(size) for size in self.batch_sizes.split(",")):
            raise ValueError(
                f"--batch-sizes {self.batch_sizes} must be whole numbers joined by commas, such "
                "as 8,16"
            )
        if not self.configurations and self.probe is None:
            raise ValueError(
                "--skip-baseline and --no-gradient-checkpointing leave nothing to measure; drop one"
            )
        if self.load_model and self.save_model:
            raise ValueError(
                f"--save-model {self.save_model} writes a student that was made here; "
                "drop --load-model or it"
            )
        require_at_least(1, self, "steps", "processes")
        require_at_least(2, self, "seq_len")
        if self.shard and self.processes == 1:
            raise ValueError("--shard spreads weights over processes; give --processes as well")
        for flag in ("memory_limit", "probe_seconds"):
            value = getattr(self, flag)
            if value is not None and value <= 0:
                raise ValueError(f"--{flag.replace('_', '-')} {value} must be above 0")

    @property
    def configurations(self) -> dict[str, bool]:
        """Return what is measured, and whether activations are recomputed in it."""
        measured = {
            "baseline": not self.skip_baseline,
            "checkpointing": self.gradient_checkpointing,
        }
        return {name: name == "checkpointing" for name in measured if measured[name]}

    @property
    def sizes(self) -> list[int]:
        """Return --batch-sizes, each once."""
        return list(dict.fromkeys(int(size) for size in self.batch_sizes.split(",")))

    @property
    def limit_bytes(self) -> int | None:
        """Return --memory-limit in bytes."""
        return None if self.memory_limit is None else int(self.memory_limit * GB)
