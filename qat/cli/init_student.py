"""`qat init-student`: a full-precision model to a student."""

from collections.abc import Sequence

from qat.cli.command import run_command
from qat.pipelines.quantize_config import InitStudentConfig

PIPELINE = "qat.pipelines.quantize:quantize"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command(
        "qat init-student", InitStudentConfig, "qat.pipelines.quantize:quantize", argv
    )


if __name__ == "__main__":
    raise SystemExit(main())
