"""`qat convert-cache`: write a cache of another form in the native one."""

from collections.abc import Sequence

from qat.cache.config import ConvertCacheConfig
from qat.cli.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    pipeline = "qat.pipelines.convert_cache:convert_cache"
    return run_command("qat convert-cache", ConvertCacheConfig, pipeline, argv)


if __name__ == "__main__":
    raise SystemExit(main())
