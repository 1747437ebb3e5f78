"""Settings of runs that train a full-precision model; imports no torch, so that help is quick."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qat.runtime.config import PlaceConfig, require_at_least, require_at_most, require_seed
from qat.storage.addresses import TAKES_ADDRESS
from qat.train.config import (
    MOST_SEQUENCES,
    Compile,
    IntervalsConfig,
    RateConfig,
    TrackingConfig,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseOptimConfig(RateConfig):
    """Optimizer, learning rate and its schedule."""

    lr: float = 3e-4
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averages of gradients and of their squares."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        RateConfig.__post_init__(self)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"--optim.betas {self.betas} must be two within 0 and 1; try 0.9 0.95")


@dataclass(frozen=True, slots=True)
class Stage:
    """Steps of one length of blocks, from its first on."""

    first_step: int
    seq_len: int
    batch_size: int
    """Blocks of a micro-batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseConfig(PlaceConfig):
    """What such runs have in common."""

    output_dir: Path = field(metadata=TAKES_ADDRESS)
    """Folder of the run: record, best and final model, state to resume from; or an address, such as
    s3://bucket/run, as `qat train` takes it."""
    eval_sets: tuple[str, ...] = ()
    """Texts that are measured as well, NAME=SOURCE or SOURCE each, as `qat evaluate --perplexity`
    takes them; windows are as long as the longest blocks."""
    eval_only: bool = False
    """Measure the run's best model on held-out documents and --eval-sets, and stop."""
    seq_len: int = 1024
    """Tokens of a block."""
    documents: Literal["joined", "separate"] = "joined"
    """Whether documents in one block attend to each other; no first token of one is a label."""
    max_steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 8
    """Blocks of a micro-batch; processes of torchrun share them."""
    accumulation_steps: int = 1
    """Micro-batches of a step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    compile: Compile = "auto"
    """Run each decoder layer as a compiled program (torch.compile), which the first steps take a
    minute to make. auto: on CUDA."""
    fp8: bool = True
    """Multiply in float8 in decoder layers where the device does and torchao is installed; it is
    said where not. --no-fp8: nowhere."""
    seed: int = 0
    """Decides the order of the data, and what else is drawn."""
    optim: DenseOptimConfig = field(default_factory=DenseOptimConfig)
    intervals: IntervalsConfig = field(default_factory=IntervalsConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        require_at_least(1, self, "max_steps", "batch_size", "accumulation_steps")
        require_at_most(MOST_SEQUENCES, self, "batch_size", "accumulation_steps")
        require_at_least(2, self, "seq_len")
        require_seed(self)

    def stages(self) -> list[Stage]:
        """Return the stages in order; the first begins at step 0."""
        return [Stage(0, self.seq_len, self.batch_size)]

    @property
    def longest(self) -> int:
        """Return the most tokens of a block."""
        return max(stage.seq_len for stage in self.stages())
