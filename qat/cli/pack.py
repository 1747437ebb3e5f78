"""`qat pack`: a cache or a run as one archive with its checksum."""

from collections.abc import Sequence
from dataclasses import asdict

from qat.cli.command import run_command
from qat.pipelines.pack import PackConfig, pack


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat pack", PackConfig, lambda config: asdict(pack(config)), argv)


if __name__ == "__main__":
    raise SystemExit(main())
