"""`qat log-run`: write a run into the speedrun log."""

from collections.abc import Sequence

from qat.cli.command import run_command
from qat.reports.log import LogRunConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat log-run", LogRunConfig, "qat.pipelines.log_run:log_run", argv)
