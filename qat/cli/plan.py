"""`qat plan`: the format of every tensor, and the bytes of the file."""

from collections.abc import Sequence

from qat.cli.command import run_command
from qat.pipelines.plan_config import PlanConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat plan", PlanConfig, "qat.pipelines.plan:plan", argv)


if __name__ == "__main__":
    raise SystemExit(main())
