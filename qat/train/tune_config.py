"""Settings of `qat tune`; imports no torch, so that help is quick."""

from dataclasses import dataclass, field
from typing import Literal

from qat.data.config import Format, LossOn, TextConfig, Thinking
from qat.train.dense_config import DenseConfig, DenseOptimConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneOptimConfig(DenseOptimConfig):
    """Optimizer, learning rate and its schedule."""

    lr: float = 2e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averages of gradients and of their squares."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig(DenseConfig):
    """Tune a full-precision model on instructions or conversations. Weights are float32."""

    model: str
    """Model to start from: a folder, a run of `qat pretrain`, or a hub name."""
    data: str
    """A json, jsonl, parquet or text file, a folder of them, or a hub name, such as
    tatsu-lab/alpaca."""
    format: Format = "auto"
    """What the records' fields mean; auto tells from the first record."""
    thinking: Thinking = "false"
    """The chat template's enable_thinking; both and all render each record several times, none
    joins the contents without a template."""
    loss_on: LossOn = "assistant"
    """Which tokens are learned: the assistant's, the end of its turns included, or all."""
    heldout_ratio: float = 0.05
    """Share of the blocks that is held out and measures, by record."""
    seq_len: int = 512
    """Tokens of a block, of as many records as fit; of longer ones the end is left out."""
    documents: Literal["joined", "separate"] = "separate"
    """Whether records in one block attend to each other; no first token of one is a label."""
    optim: TuneOptimConfig = field(default_factory=TuneOptimConfig)

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        DenseConfig.__post_init__(self)
        if not 0 < self.heldout_ratio < 1:
            raise ValueError(
                f"--heldout-ratio {self.heldout_ratio} must be above 0 and below 1: the best model "
                "is the one that held-out records choose"
            )

    @property
    def text(self) -> TextConfig:
        """Return how records become blocks."""
        names = ("format", "thinking", "seq_len", "loss_on", "heldout_ratio", "seed")
        return TextConfig(**{name: getattr(self, name) for name in names})
