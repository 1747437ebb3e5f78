"""What `qat export` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Target = Literal["hf", "hf-quantized", "gguf", "mlx", "compressed-tensors", "coreml"]
ExportDtype = Literal["fp32", "bf16", "fp16"]
HeadType = Literal["f16", "bf16", "f32", "q8_0"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Write a student in another program's format, and check what was written."""

    checkpoint: str
    """The student: native folder, run folder (its best) or `.pt` file with its config.json."""
    to: Target
    """hf: dense safetensors that plain transformers loads. hf-quantized: packed, any plan, loads
    after `import qat.export.plugin`. gguf: llama.cpp and its kin. mlx: mlx-lm.
    compressed-tensors: transformers and vLLM. coreml: an ML program of the quantized linears."""
    output: Path
    """Where it goes; must not exist, but for what the same call made. gguf: a path ending in .gguf
    is the file itself."""
    model_id: str | None = None
    """Full-precision model of a `.pt` checkpoint: folder or hub name; the one its config names."""
    dtype: ExportDtype | None = None
    """Of what is not packed. hf: of everything, fp32 when not given, which holds every weight as it
    was trained. gguf: writes a dense reference file, for any student. Others: the smallest
    dtype that loses nothing when not given."""
    head: HeadType | None = None
    """gguf: type of embeddings and head; f16 when not given."""

    def __post_init__(self) -> None:
        """Refuse flags that the format has no use for."""
        if self.head is not None and (self.to != "gguf" or self.dtype is not None):
            raise ValueError(
                f"--head {self.head} is for packed gguf files; leave it out with --to {self.to}"
                + (f" --dtype {self.dtype}" if self.dtype else "")
            )
