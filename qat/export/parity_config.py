"""What `qat parity` can be told."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityConfig:
    """Run an exported file in its runtime; compare logits and greedy answers with the student."""

    checkpoint: str
    """The student that was exported: native folder, run folder or `.pt` file."""
    export: Path
    """What `qat export` wrote: a folder or a .gguf file."""
    prompts: Path
    """Text file, one prompt a line."""
    seed: int = 0
    """Which prompts are drawn where the file has more than are asked for."""
    num_prompts: int = 8
    """Prompts compared."""
    num_new_tokens: int = 16
    """Tokens of each greedy answer."""
    model_id: str | None = None
    """Full-precision model of a `.pt` checkpoint: folder or hub name; the one its config names."""

    def __post_init__(self) -> None:
        """Refuse counts below one."""
        if self.num_prompts < 1 or self.num_new_tokens < 1:
            raise ValueError(
                f"--num-prompts {self.num_prompts} and --num-new-tokens {self.num_new_tokens} "
                "must be at least 1"
            )
