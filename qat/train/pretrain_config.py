"""Settings of `qat pretrain`; imports no torch, so that help is quick."""

from dataclasses import dataclass
from pathlib import Path

from qat.runtime.config import require_at_least
from qat.train.config import MOST_SEQUENCES
from qat.train.dense_config import DenseConfig, Stage

# The first stage and the last three are those of Yxanul 197M's document; those between are filled
# in. It names no steps for any of them: each has a tenth.
YXANUL = (
    *((8, 8192), (16, 6144), (32, 4096), (64, 3072), (128, 2048)),
    *((256, 1024), (512, 512), (768, 256), (1536, 128), (2048, 64)),
)
EXAMPLE = "such as 128:64:0,512:16:1000"


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig(DenseConfig):
    """Train a new model on token shards to predict the next token. Weights are float32."""

    data_dir: Path
    """Shards of `qat tokenize`; their held-out documents measure."""
    arch: str = "tiny-15m"
    """Shape of the model: tiny-15m, medium-200m, plan-1.5b, kisoku-3.2b, yxanul-197m, or a
    config.json of a causal model, or its folder."""
    vocab_size: int | None = None
    """Rows of the embedding, the tokenizer's or more; the shape's own when not given."""
    curriculum: str | None = None
    """Stages as length:batch:first step, in place of --seq-len and --batch-size, or yxanul for ten
    stages from 8 tokens to 2048."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        DenseConfig.__post_init__(self)
        require_at_least(2, self, "vocab_size")
        self.stages()

    def stages(self) -> list[Stage]:
        """Return the stages in order; the first begins at step 0."""
        if self.curriculum is None:
            return DenseConfig.stages(self)
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
        batches = [stage.batch_size for stage in stages]
        if min(s.seq_len for s in stages) < 2 or min(batches) < 1 or max(batches) > MOST_SEQUENCES:
            raise ValueError(
                f"--curriculum {self.curriculum} has a length below 2, or a batch below 1 or above "
                f"{MOST_SEQUENCES}; {EXAMPLE}"
            )
        return stages
