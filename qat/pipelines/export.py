"""Write a student in another program's format, and compare what was written with the student."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qat.export.checks import REPORT_NAME, require_replaceable
from qat.export.config import ExportConfig
from qat.export.gguf_family import require_family
from qat.export.to_compressed_tensors import export_to_compressed_tensors
from qat.export.to_coreml import export_to_coreml
from qat.export.to_gguf import SUFFIX, export_to_gguf
from qat.export.to_hf import export_to_hf
from qat.export.to_hf_quantized import export_to_hf_quantized
from qat.export.to_mlx import export_to_mlx
from qat.model.checkpoint import (
    CheckpointHeader,
    bits_per_weight,
    read_model_config,
    text_files,
)
from qat.model.load import model_identity, unchanged_sha256
from qat.pipelines.open_checkpoint import Checkpoint, open_checkpoint
from qat.reports.model_card import write_card
from qat.runtime.device import DTYPES
from qat.storage.decode import as_type, object_in
from qat.storage.files import atomic_output, fingerprint, sha256_of_file, write_json
from qat.tracking.messages import say

MADE_FROM = "made_from"  # the report's field of what decides an export
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
    """Load a student, write it in a format, read it back, compare, and write its model card.

    The output appears when all of this is done. One that the same call made is found again.

    Raises:
        ValueError: If the output exists and was made otherwise, or the format cannot hold the
            student exactly.
    """
    opened = open_checkpoint(config.checkpoint, model_id=config.model_id)
    if config.output.exists():
        return finished(config, opened)
    if config.to == "gguf":  # a family that it lacks is known before gigabytes are read
        require_family(read_model_config(opened.text_folder).get_text_config())
        if config.output.suffix == SUFFIX:
            require_replaceable(config.output.parent / REPORT_NAME)
    student = opened.load()
    sizes = bits_per_weight(student)  # before some formats make it dense
    say(f"{config.checkpoint} to {config.to}, {config.dtype or 'dtype as the format needs'}")
    with atomic_output(config.output) as place:
        report = find_exporter(config, opened.header)(
            student,
            place,
            text_source=opened.text_folder,
            dtype=DTYPES[config.dtype] if config.dtype else None,
        )
        report |= sizes | {"path": str(config.output)}
        write_card(
            report,
            opened.header,
            opened.path,
            target=config.to,
            dtype=config.dtype,
            output=place,
        )
        write_json(report_file(place), report | {MADE_FROM: made_from(config, opened)})
    return ExportResult(**report)


def made_from(config: ExportConfig, opened: Checkpoint) -> str:
    """Return what names all that decides an export: the content of a checkpoint, and settings."""
    files = [opened.text_folder / "config.json", *text_files(opened.text_folder)]
    text = {file.name: sha256_of_file(file) for file in files}
    if opened.header is not None:
        weights = asdict(opened.header)
    elif opened.path.is_file():
        weights = {"sha256": unchanged_sha256(opened.path)}
    else:
        weights = model_identity(opened.path)
    return fingerprint([weights, text, config.to, config.dtype, config.head])


def finished(config: ExportConfig, opened: Checkpoint) -> ExportResult:
    """Return what the same call has made; refuse anything else."""
    output, file = config.output, report_file(config.output)
    report = object_in(file) if file.is_file() else {}
    is_named = Path(str(report.get("path"))).name == output.name
    if not is_named or report.pop(MADE_FROM, None) != made_from(config, opened):
        raise ValueError(f"--output {output} exists; remove it or name another")
    say(f"{output} is already complete: nothing to do")
    return as_type(report, ExportResult, file)


def report_file(output: Path) -> Path:
    """Return where the report of an export is: in its folder, or next to its file."""
    return (output if output.is_dir() else output.parent) / REPORT_NAME


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
