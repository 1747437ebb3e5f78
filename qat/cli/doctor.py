"""`qat doctor`: show the device, what is installed, and what to install."""

from collections.abc import Sequence

from qat.cli.command import run_command
from qat.pipelines.doctor import DoctorConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat doctor", DoctorConfig, "qat.pipelines.doctor:examine", argv)
