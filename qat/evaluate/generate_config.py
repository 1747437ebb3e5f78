"""Flags of `qat generate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qat.runtime.config import PlaceConfig, require_at_least, require_seed

Template = Literal["chat", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig(PlaceConfig):
    """Answer prompts, or fill in the answers of an instruction file."""

    checkpoint: str
    """Native folder, run folder (its best), `.pt` file with its config.json, model folder or hub
    name."""
    model_id: str | None = None
    """Full-precision model of a `.pt` checkpoint: folder or hub name; the one its config names."""
    prompt: tuple[str, ...] = ()
    """One or more prompts, each in quotes."""
    data: Path | None = None
    """JSON lines with instruction, input, output; answers what has no output yet."""
    output: Path | None = None
    """Where the answered rows go, with --data; the data file itself is allowed."""
    overwrite_outputs: bool = False
    """With --data: answer every row, also those that have an output."""
    max_new_tokens: int = 128
    """An answer ends here at the latest."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above 0 samples."""
    batch_size: int = 16
    """Prompts answered at once; those of similar length go together."""
    template: Template = "chat"
    """chat: the tokenizer's chat template, where it has one. none: continues the bare prompt."""
    seed: int = 0
    """For sampling."""

    def __post_init__(self):
        require_seed(self)
        if bool(self.prompt) == bool(self.data):
            raise ValueError("give either --prompt TEXT... or --data FILE.jsonl with --output")
        if (self.data is None) != (self.output is None):
            raise ValueError("--data and --output go together; give both")
        if any(not text.strip() for text in self.prompt):
            raise ValueError("--prompt has an empty text; remove it")
        require_at_least(1, self, "max_new_tokens", "batch_size")
        require_at_least(0, self, "temperature")
