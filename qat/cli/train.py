"""`qat train`: distil a teacher's cache into a student."""

from collections.abc import Sequence

from qat.cli.command import run_command
from qat.train.config import TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command(
        "qat train", TrainConfig, "qat.pipelines.train:train", argv, has_config_flag=True
    )
