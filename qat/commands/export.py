"""`qat export`: a student in another program's format, compared with what was written."""

from collections.abc import Sequence
from typing import Any

from qat.commands.door import run_command, say
from qat.export.config import ExportConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat export", ExportConfig, act, argv)


def act(config: ExportConfig) -> dict[str, Any]:
    """Load the student, hand it to the format's writer."""
    if config.output.exists():
        raise ValueError(f"--output {config.output} exists; remove it or name another")

    from qat.device import DTYPES
    from qat.export.to_hf import export_to_hf
    from qat.model.load import load_model, open_checkpoint

    exporters = {"hf": export_to_hf}
    opened = open_checkpoint(config.checkpoint, model_id=config.model_id)
    student, _header = load_model(config.checkpoint, model_id=config.model_id)
    say(f"{config.checkpoint} to {config.to}, {config.dtype}")
    return exporters[config.to](
        student, config.output, text_source=opened.text_folder, dtype=DTYPES[config.dtype]
    )


if __name__ == "__main__":
    raise SystemExit(main())
