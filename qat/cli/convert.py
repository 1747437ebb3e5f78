"""`qat convert`: a student to another plan, with what that costs."""

from collections.abc import Sequence

from qat.cli.command import run_command
from qat.pipelines.convert_config import ConvertConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat convert", ConvertConfig, "qat.pipelines.convert:convert", argv)


if __name__ == "__main__":
    raise SystemExit(main())
