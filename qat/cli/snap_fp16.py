"""`qat snap-fp16`: a student whose every stored number is a float16 one."""

from collections.abc import Sequence

from qat.cli.command import run_command
from qat.pipelines.quantize_config import SnapFp16Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat snap-fp16", SnapFp16Config, "qat.pipelines.snap_fp16:snap_fp16", argv)


if __name__ == "__main__":
    raise SystemExit(main())
