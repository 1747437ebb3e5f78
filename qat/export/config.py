"""What `qat export` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Target = Literal["hf"]
ExportDtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Write a student in another program's format, and check what was written."""

    checkpoint: str
    """The student: native folder, run folder (its best) or `.pt` file with its config.json."""
    to: Target
    """hf: dense safetensors that plain transformers loads."""
    output: Path
    """Where it goes; must not exist."""
    model_id: str | None = None
    """Full-precision model of a `.pt` checkpoint: folder or hub name; the one its config names."""
    dtype: ExportDtype = "fp32"
    """Of the tensors written; fp32 holds every weight as it was trained, the others round."""
