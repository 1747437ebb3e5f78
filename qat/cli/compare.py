"""`qat compare`: compare runs on disk or at W&B."""

from collections.abc import Sequence

from qat.cli.command import run_command
from qat.reports.compare import CompareConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat compare", CompareConfig, "qat.pipelines.compare:compare", argv)
