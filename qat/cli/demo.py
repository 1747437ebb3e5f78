"""`qat demo`: run the whole path on SmolLM2-135M."""

from collections.abc import Sequence

from qat.cli.command import run_command
from qat.pipelines.demo_config import DemoConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat demo", DemoConfig, "qat.pipelines.demo:demo", argv)
