"""Flags of `qat demo`."""

from dataclasses import dataclass
from pathlib import Path

from qat.pipelines.compress_config import parse_size
from qat.runtime.config import require_at_least


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
    """Quantizations by llama.cpp itself to make for the table, joined by commas."""
    max_new_tokens: int = 40
    """Of an answer."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        require_at_least(1, self, "max_new_tokens")
        for size in self.sizes.split(","):
            parse_size(size)
