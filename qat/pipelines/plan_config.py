"""Flags of `qat plan`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """Show what a plan gives each tensor of a model, and the bytes of the file that it makes.

    Reads the model's config only, never its weights.
    """

    model: str
    """Hugging Face folder or hub name of the full-precision model."""
    plan: str = "q4a4"
    """A preset (q2a4, q4a4_r32, deploy), formats of MLP and attention joined by a plus
    (gguf:q2_0+gguf:q4_0), rules (q2a4, embed=int4-g32, layers.0.*=gguf:q8_0), or a JSON file. Rules
    are PATTERN=FORMAT joined by commas, the last that matches a tensor decides; patterns are mlp,
    attention, embed, head, linears, all, or shell patterns for parameter names."""
    to: Literal["gguf", "tensors"] = "tensors"
    """gguf: file_bytes is that of the GGUF file, tokenizer and keys included. tensors: of all
    tensors together."""
    save: Path | None = None
    """File to write the plan to, as JSON that --plan takes."""
