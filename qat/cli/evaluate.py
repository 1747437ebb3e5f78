"""`qat evaluate`: measure a student."""

from collections.abc import Sequence

from qat.cli.command import run_command
from qat.evaluate.config import EvaluateConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat evaluate", EvaluateConfig, "qat.pipelines.evaluate:evaluate", argv)
