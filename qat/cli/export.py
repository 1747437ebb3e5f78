"""`qat export`: write a student in another format and compare it with what was written."""

from collections.abc import Sequence

from qat.cli.command import run_command
from qat.export.config import ExportConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat export", ExportConfig, "qat.pipelines.export:export", argv)
