"""`qat bench`: measure training steps and caches as ratios, conversions in seconds."""

from collections.abc import Sequence

from qat.benchmark.config import BenchConfig
from qat.cli.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat bench", BenchConfig, "qat.pipelines.bench:bench", argv)
