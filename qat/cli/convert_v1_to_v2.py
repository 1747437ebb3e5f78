"""`qat convert-v1-to-v2`: a student of the seeds' first form to the second."""

from collections.abc import Sequence

from qat.cli.command import run_command
from qat.pipelines.quantize_config import ConvertV1ToV2Config

PIPELINE = "qat.pipelines.convert_v1_to_v2:convert_v1_to_v2"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command(
        "qat convert-v1-to-v2",
        ConvertV1ToV2Config,
        "qat.pipelines.convert_v1_to_v2:convert_v1_to_v2",
        argv,
    )


if __name__ == "__main__":
    raise SystemExit(main())
