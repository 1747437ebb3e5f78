"""A cache of another form to the native one."""

import time
from dataclasses import dataclass
from pathlib import Path

from qat.cache.build import rewrite_cache
from qat.cache.config import ConvertCacheConfig
from qat.cache.manifest import MANIFEST_FILE, read_manifest, require_identity
from qat.pipelines.open_cache import open_teacher_cache
from qat.tracking.messages import say


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertCacheResult:
    """A native cache, and how it compares with what it was made from."""

    cache: Path
    """Its folder."""
    content: str
    """What it keeps of each position."""
    tokens: int
    """In all blocks."""
    bytes_per_token: float
    """Of the shards."""
    bytes_per_token_before: float
    """Of the shards that were read."""
    fingerprint: str
    """16 hex digits that name the cache; the source has the same."""
    seconds: float
    """Of the conversion."""


def convert_cache(config: ConvertCacheConfig) -> ConvertCacheResult:
    """Write the cache, or find it where an earlier call wrote it."""
    started = time.perf_counter()
    cache = open_teacher_cache(config.source)
    if cache.manifest.identity.content == "conditional":
        say("it keeps no log-partition: kl_nats on it is conditional on its ids, and stays so")
    if (config.target / MANIFEST_FILE).is_file():
        manifest = read_manifest(config.target)
        require_identity(manifest.identity, cache.manifest.identity, config.target)
        say(f"{config.target} is already complete: nothing to do")
    else:
        manifest = rewrite_cache(cache, config.target)
    return ConvertCacheResult(
        cache=config.target,
        content=manifest.identity.content,
        tokens=manifest.num_tokens,
        bytes_per_token=manifest.bytes_per_token,
        bytes_per_token_before=cache.manifest.bytes_per_token,
        fingerprint=manifest.fingerprint,
        seconds=round(time.perf_counter() - started, 2),
    )
