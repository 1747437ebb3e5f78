"""`qat convert-q4-to-q2`: a 4-bit student to one with 2-bit MLP layers."""

from collections.abc import Sequence

from qat.cli.command import run_command
from qat.pipelines.quantize_config import ConvertQ4ToQ2Config

PIPELINE = "qat.pipelines.convert:convert_q4_to_q2"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command(
        "qat convert-q4-to-q2", ConvertQ4ToQ2Config, "qat.pipelines.convert:convert_q4_to_q2", argv
    )


if __name__ == "__main__":
    raise SystemExit(main())
