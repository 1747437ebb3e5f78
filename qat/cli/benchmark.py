"""`qat benchmark`: find the largest batch that fits and the fastest one."""

from collections.abc import Sequence

from qat.benchmark.config import BenchmarkConfig
from qat.cli.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat benchmark", BenchmarkConfig, "qat.pipelines.benchmark:benchmark", argv)
