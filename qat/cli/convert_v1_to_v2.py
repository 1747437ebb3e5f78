"""`qat convert-v1-to-v2`: a student of the seeds' first form to the second."""

from collections.abc import Sequence
from typing import Any

from qat.cli.command import run_command
from qat.pipelines.quantize_config import ConvertV1ToV2Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat convert-v1-to-v2", ConvertV1ToV2Config, act, argv)


def act(config: ConvertV1ToV2Config) -> dict[str, Any]:
    """Open the student, take the floors away, measure before and after, write."""
    from qat.legacy.v1_to_v2 import remove_floors, second_form_scheme
    from qat.pipelines.students import reform

    def change(student: Any) -> dict[str, Any]:
        return remove_floors(student).values()

    return reform("convert-v1-to-v2", config, config.v1_checkpoint, second_form_scheme, change)


if __name__ == "__main__":
    raise SystemExit(main())
