"""`qat build-cache`: write the teacher's logits on a data set, once."""

from collections.abc import Sequence

from qat.cache.config import BuildCacheConfig
from qat.cli.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    pipeline = "qat.pipelines.build_cache:build_cache"
    return run_command("qat build-cache", BuildCacheConfig, pipeline, argv)


if __name__ == "__main__":
    raise SystemExit(main())
