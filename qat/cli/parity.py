"""`qat parity`: compare an exported file in its runtime with the student in PyTorch."""

from collections.abc import Sequence

from qat.cli.command import run_command
from qat.export.parity_config import ParityConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat parity", ParityConfig, "qat.pipelines.parity:check_parity", argv)
