"""`qat push`: a cache, a run or a checkpoint into a store, packed, with its checksum."""

from collections.abc import Sequence
from dataclasses import asdict

from qat.cli.command import run_command
from qat.pipelines.push import PushConfig, push


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat push", PushConfig, lambda config: asdict(push(config)), argv)


if __name__ == "__main__":
    raise SystemExit(main())
