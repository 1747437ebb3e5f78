"""Flags of `qat demo`."""

from dataclasses import dataclass
from pathlib import Path

from qat.pipelines.compress_config import parse_size
from qat.runtime.config import require_at_least

MOST_NEW_TOKENS = 256  # which fit the context of every runtime with a prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Make small files of SmolLM2-135M that llama.cpp runs, next to llama.cpp's own."""

    output_dir: Path = Path("runs/demo")
    """Where the files go, and what they are made of."""
    model_dir: Path = Path("models/smollm2-135m")
    """Where the teacher goes."""
    data: str = "speedrun/data/instructions.jsonl"
    """Text that calibrates and measures."""
    sizes: str = "78MB,54MB"
    """Sizes of files, joined by commas: one that answers like the teacher, one at the edge."""
    minutes: float = 2.0
    """Time for a file."""
    stock: str = "IQ4_NL,IQ3_XXS"
    """Quantizations by ik_llama.cpp to make for the table, joined by commas."""
    max_new_tokens: int = 40
    """Of an answer, 256 at most."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        require_at_least(1, self, "max_new_tokens")
        if self.max_new_tokens > MOST_NEW_TOKENS:
            raise ValueError(
                f"--max-new-tokens {self.max_new_tokens}: give {MOST_NEW_TOKENS} at most"
            )
        for size in self.each_size:
            parse_size(size)

    @property
    def each_size(self) -> list[str]:
        """Return the sizes apart."""
        return [size.strip() for size in self.sizes.split(",")]
