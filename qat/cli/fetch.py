"""`qat fetch`: models, caches and checkpoints by name, path or URL; whole and checked."""

from collections.abc import Sequence
from dataclasses import asdict

from qat.cli.command import run_command
from qat.pipelines.fetch import FetchConfig, fetch


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat fetch", FetchConfig, lambda config: asdict(fetch(config)), argv)


if __name__ == "__main__":
    raise SystemExit(main())
