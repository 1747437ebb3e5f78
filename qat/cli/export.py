"""`qat export`: a student in another program's format, compared with what was written."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from qat.cli.command import run_command
from qat.export.config import ExportConfig
from qat.tracking.messages import say


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat export", ExportConfig, act, argv)


def act(config: ExportConfig) -> dict[str, Any]:
    """Load the student, hand it to the format's writer, describe what was written."""
    if config.output.exists():
        raise ValueError(f"--output {config.output} exists; remove it or name another")

    from qat.model.checkpoint import bits_per_weight
    from qat.pipelines.open_checkpoint import load_model, open_checkpoint
    from qat.reports.model_card import write_card
    from qat.runtime.device import DTYPES

    opened = open_checkpoint(config.checkpoint, model_id=config.model_id)
    student, header = load_model(config.checkpoint, model_id=config.model_id)
    sizes = bits_per_weight(student)
    say(f"{config.checkpoint} to {config.to}, {config.dtype or 'dtype as the format needs'}")
    report = exporter_of(config, header)(
        student,
        config.output,
        text_source=opened.text_folder,
        dtype=DTYPES[config.dtype] if config.dtype else None,
    )
    closing = report | sizes
    write_card(
        closing,
        header,
        opened.path,
        target=config.to,
        dtype=config.dtype,
        output=config.output,
    )
    return closing


def exporter_of(config: ExportConfig, header: Any) -> Any:
    """Return the format's writer."""
    import torch

    from qat.export.to_compressed_tensors import export_to_compressed_tensors
    from qat.export.to_coreml import export_to_coreml
    from qat.export.to_gguf import export_to_gguf
    from qat.export.to_hf import export_to_hf
    from qat.export.to_hf_quantized import export_to_hf_quantized
    from qat.export.to_mlx import export_to_mlx
    from qat.quant.scheme import Scheme

    def to_hf(student: Any, output: Any, *, text_source: Any, dtype: Any) -> dict[str, Any]:
        return export_to_hf(student, output, text_source=text_source, dtype=dtype or torch.float32)

    scheme = Scheme.from_dict(header.scheme) if header else None
    return {
        "hf": to_hf,
        "hf-quantized": partial(export_to_hf_quantized, scheme=scheme),
        "gguf": partial(export_to_gguf, head=config.head or "f16"),
        "mlx": export_to_mlx,
        "compressed-tensors": export_to_compressed_tensors,
        "coreml": export_to_coreml,
    }[config.to]


if __name__ == "__main__":
    raise SystemExit(main())
