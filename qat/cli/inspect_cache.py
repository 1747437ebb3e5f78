"""`qat inspect-cache`: show what a cache holds."""

from collections.abc import Sequence

from qat.cache.config import InspectCacheConfig
from qat.cli.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    pipeline = "qat.pipelines.inspect_cache:inspect_cache"
    return run_command("qat inspect-cache", InspectCacheConfig, pipeline, argv)


if __name__ == "__main__":
    raise SystemExit(main())
