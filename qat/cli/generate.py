"""`qat generate`: answer prompts, or the rows of an instruction file."""

from collections.abc import Sequence

from qat.cli.command import run_command
from qat.evaluate.generate_config import GenerateConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat generate", GenerateConfig, "qat.pipelines.generate:generate", argv)
