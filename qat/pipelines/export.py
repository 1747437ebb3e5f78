"""Write a student in another program's format, and compare what was written with the student."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from qat.export.config import ExportConfig
from qat.export.gguf_family import require_family
from qat.export.to_compressed_tensors import export_to_compressed_tensors
from qat.export.to_coreml import export_to_coreml
from qat.export.to_gguf import export_to_gguf
from qat.export.to_hf import export_to_hf
from qat.export.to_hf_quantized import export_to_hf_quantized
from qat.export.to_mlx import export_to_mlx
from qat.model.checkpoint import CheckpointHeader, bits_per_weight, read_model_config
from qat.pipelines.open_checkpoint import open_checkpoint
from qat.reports.model_card import write_card
from qat.runtime.device import DTYPES
from qat.tracking.messages import say

Exporter = Callable[..., dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportResult:
    """What was written, and how it compares with the student."""

    path: str
    """The folder or file."""
    exact: bool
    """Whether every quantized weight reads back as it was trained, bit for bit."""
    tensors_compared: int
    """Tensors read back and compared."""
    tensors_rounded: int
    """Tensors outside the quantized weights that the written dtype rounds."""
    file: str | None = None
    """Name of the single file that holds the weights, where there is one."""
    file_bytes: int | None = None
    """Size of the file, or of all files in the folder."""
    dtype: str | None = None
    """Of what is not packed, where there is one dtype for it."""
    head: dict[str, Any] | None = None
    """gguf: type of embeddings and head, and its noise in dB."""
    bits_per_weight: float | None = None
    """Of the quantized layers."""
    bits_per_weight_mlp: float | None = None
    """Of the MLP layers."""
    bits_per_weight_model: float | None = None
    """Of the whole model as its checkpoint stores it."""


def export(config: ExportConfig) -> ExportResult:
    """Load a student, write it in a format, read it back, compare, and write its model card."""
    if config.output.exists():
        raise ValueError(f"--output {config.output} exists; remove it or name another")
    opened = open_checkpoint(config.checkpoint, model_id=config.model_id)
    if config.to == "gguf":  # a family that it lacks is known before gigabytes are read
        require_family(read_model_config(opened.text_folder).get_text_config())
    student, header = opened.load(), opened.header
    sizes = bits_per_weight(student)
    say(f"{config.checkpoint} to {config.to}, {config.dtype or 'dtype as the format needs'}")
    report = find_exporter(config, header)(
        student,
        config.output,
        text_source=opened.text_folder,
        dtype=DTYPES[config.dtype] if config.dtype else None,
    )
    write_card(
        report | sizes,
        header,
        opened.path,
        target=config.to,
        dtype=config.dtype,
        output=config.output,
    )
    return ExportResult(**report, **sizes)


def find_exporter(config: ExportConfig, header: CheckpointHeader | None) -> Exporter:
    """Return the function that writes the format."""
    return {
        "hf": export_to_hf,
        "hf-quantized": partial(export_to_hf_quantized, plan=header.plan if header else {}),
        "gguf": partial(export_to_gguf, head=config.head or "f16"),
        "mlx": export_to_mlx,
        "compressed-tensors": export_to_compressed_tensors,
        "coreml": export_to_coreml,
    }[config.to]
