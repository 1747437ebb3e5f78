"""`qat convert-cache`: a cache of the seeds' form in ours."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from qat.cli.command import run_command
from qat.tracking.messages import say


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertCacheConfig:
    """Write a cache of the seeds' form in ours: checked, memory-mapped, smaller."""

    source: Positional[Path]
    """The cache's folder: meta.json and shard_*.pt, also nested in a folder."""
    target: Positional[Path]
    """The folder to make."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat convert-cache", ConvertCacheConfig, convert, argv)


def convert(config: ConvertCacheConfig) -> dict[str, Any]:
    """Write the cache; return the closing values."""
    from qat.cache.manifest import MANIFEST_FILE, read_manifest, require_identity
    from qat.cache.rewrite import rewrite_cache
    from qat.pipelines.open_cache import open_teacher_cache

    started = time.perf_counter()
    cache = open_teacher_cache(config.source)
    if cache.manifest.identity.content == "conditional":
        say("it keeps no log-partition: kl_nats on it is conditional on its ids, and stays so")
    if (config.target / MANIFEST_FILE).is_file():
        manifest = read_manifest(config.target)
        require_identity(manifest.identity, cache.manifest.identity, config.target)
        say(f"{config.target} is this cache: nothing to do")
    else:
        manifest = rewrite_cache(cache, config.target)
    return {
        "cache": str(config.target),
        "content": manifest.identity.content,
        "tokens": manifest.num_tokens,
        "bytes_per_token": manifest.bytes_per_token,
        "bytes_per_token_before": cache.manifest.bytes_per_token,
        "fingerprint": manifest.fingerprint,
        "seconds": round(time.perf_counter() - started, 2),
    }


if __name__ == "__main__":
    raise SystemExit(main())
