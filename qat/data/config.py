"""How text becomes blocks; imports no torch, so that help is quick."""

from dataclasses import dataclass
from typing import Literal

Format = Literal["auto", "alpaca", "sharegpt", "messages", "dolly", "text"]
Thinking = Literal["none", "false", "true", "both", "all"]
LossOn = Literal["all", "assistant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """How records become blocks."""

    format: Format = "auto"
    """What the records' fields mean; auto tells from the first record."""
    thinking: Thinking = "none"
    """The chat template's enable_thinking; both and all render each record several times, none
    joins the contents without a template."""
    seq_len: int = 64
    """Tokens a block."""
    loss_on: LossOn = "all"
    """Which tokens count."""
    num_sequences: int | None = None
    """Blocks at most, train and held-out together; all of the data when not given."""
    heldout_ratio: float = 0.125
    """Share of the blocks that is held out, by document."""
    seed: int = 0
    """Decides the held-out documents and every draw."""
