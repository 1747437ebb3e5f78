"""Any cache that can be opened, written in our form."""

from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from qat.cache.manifest import CacheManifest, write_manifest
from qat.cache.read import TeacherCache
from qat.cache.shard import id_dtype, shard_name, shard_ranges, write_fields
from qat.storage.files import atomic_folder


def rewrite_cache(cache: TeacherCache, folder: Path) -> CacheManifest:
    """Write a cache's fields as they are, in shards of ours; whole or not at all.

    What the content cannot say stays unsaid: a conditional cache stays conditional, and its
    fingerprint stays the same, so that runs go on with either.

    Args:
        cache: Any.
        folder: Must not exist.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it or choose another name")
    ids = id_dtype(cache.vocab_size or 2**31)  # old caches may not say
    with atomic_folder(folder) as made:
        entries = []
        ranges = shard_ranges(cache.num_sequences, cache.seq_len)
        for index, rows in tqdm(ranges.items(), unit="shard"):
            fields = cache.fields(rows.numpy())
            path = made / shard_name(index)
            entries.append(write_fields(path, fields, ids=ids, num_sequences=len(rows)))
        manifest = replace(cache.manifest, shards=tuple(entries))
        write_manifest(made, manifest)
    return manifest
