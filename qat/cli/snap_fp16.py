"""`qat snap-fp16`: a student whose every stored number is a float16 one."""

from collections.abc import Sequence
from typing import Any

from qat.cli.command import run_command
from qat.pipelines.quantize_config import SnapFp16Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat snap-fp16", SnapFp16Config, act, argv)


def act(config: SnapFp16Config) -> dict[str, Any]:
    """Open the student, round it, measure before and after, write."""
    from qat.legacy.fp16_snap import float16_scheme, snap_student
    from qat.pipelines.quantize_config import SEED_SUFFIX
    from qat.pipelines.students import reform

    def change(student: Any) -> dict[str, Any]:
        return snap_student(student, bake=config.output.suffix == SEED_SUFFIX).values()

    return reform("snap-fp16", config, config.checkpoint, float16_scheme, change, is_float16=True)


if __name__ == "__main__":
    raise SystemExit(main())
