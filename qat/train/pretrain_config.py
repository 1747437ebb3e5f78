"""Settings of `qat pretrain`; imports no torch, so that help is quick."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qat.runtime.config import PlaceConfig, require_at_least
from qat.storage.addresses import TAKES_ADDRESS
from qat.train.config import IntervalsConfig, RateConfig, TrackingConfig

# The first stage and the last three are those of Yxanul 197M's document; those between are filled
# in. It names no steps for any of them: each has a tenth.
YXANUL = (
    *((8, 8192), (16, 6144), (32, 4096), (64, 3072), (128, 2048)),
    *((256, 1024), (512, 512), (768, 256), (1536, 128), (2048, 64)),
)
EXAMPLE = "such as 128:64:0,512:16:1000"


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainOptimConfig(RateConfig):
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
class PretrainConfig(PlaceConfig):
    """Train a new model on token shards to predict the next token. Weights are float32."""

    data_dir: Path
    """Shards of `qat tokenize`; their held-out documents measure."""
    eval_sets: tuple[str, ...] = ()
    """Texts that are measured as well, NAME=SOURCE or SOURCE each, as `qat evaluate --perplexity`
    takes them; windows are as long as the longest blocks."""
    output_dir: Path = field(metadata=TAKES_ADDRESS)
    """Folder of the run: record, best and final model, state to resume from; or an address, such as
    s3://bucket/run, as `qat train` takes it."""
    arch: str = "tiny-15m"
    """Shape of the model: tiny-15m, medium-200m, plan-1.5b, kisoku-3.2b, yxanul-197m, or a
    config.json of a causal model, or its folder."""
    vocab_size: int | None = None
    """Rows of the embedding, the tokenizer's or more; the shape's own when not given."""
    seq_len: int = 1024
    """Tokens of a block."""
    documents: Literal["joined", "separate"] = "joined"
    """Whether documents in one block attend to each other; no first token of one is a label."""
    max_steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 8
    """Blocks of a micro-batch."""
    accumulation_steps: int = 1
    """Micro-batches of a step."""
    curriculum: str | None = None
    """Stages as length:batch:first step, in place of --seq-len and --batch-size, or yxanul for ten
    stages from 8 tokens to 2048."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    seed: int = 0
    """Decides the first weights and the order of the data."""
    optim: PretrainOptimConfig = field(default_factory=PretrainOptimConfig)
    intervals: IntervalsConfig = field(default_factory=IntervalsConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        require_at_least(1, self, "max_steps", "batch_size", "accumulation_steps")
        require_at_least(2, self, "seq_len", "vocab_size")
        self.stages()

    def stages(self) -> list[Stage]:
        """Return the stages in order; the first begins at step 0."""
        if self.curriculum is None:
            return [Stage(0, self.seq_len, self.batch_size)]
        if self.curriculum == "yxanul":
            firsts = [place * self.max_steps // len(YXANUL) for place in range(len(YXANUL))]
            return [Stage(first, *shape) for first, shape in zip(firsts, YXANUL, strict=True)]
        try:
            rows = [tuple(map(int, part.split(":"))) for part in self.curriculum.split(",")]
            stages = [Stage(step, length, batch) for length, batch, step in rows]
        except ValueError:
            stages = []
        stages.sort(key=lambda stage: stage.first_step)
        firsts = [stage.first_step for stage in stages]
        if not stages or firsts[0] != 0 or len(set(firsts)) < len(firsts):
            raise ValueError(
                f"--curriculum {self.curriculum} must be length:batch:first step from step 0 on, "
                f"{EXAMPLE}"
            )
        if min(s.seq_len for s in stages) < 2 or min(s.batch_size for s in stages) < 1:
            raise ValueError(
                f"--curriculum {self.curriculum} has a length below 2 or a batch below 1; {EXAMPLE}"
            )
        return stages

    @property
    def longest(self) -> int:
        """Return the most tokens of a block."""
        return max(stage.seq_len for stage in self.stages())
