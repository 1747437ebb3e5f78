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
    from qat.model.load import checkpoint_folder, load_model

    exporters = {"hf": export_to_hf}
    student, _header = load_model(config.checkpoint)
    say(f"{config.checkpoint} to {config.to}, {config.dtype}")
    folder = checkpoint_folder(config.checkpoint)
    return exporters[config.to](
        student, config.output, text_source=folder, dtype=DTYPES[config.dtype]
    )


if __name__ == "__main__":
    raise SystemExit(main())
