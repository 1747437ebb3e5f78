"""What a cache's path stands for: a native cache, or one of the seeds' form."""

from pathlib import Path

from qat.cache.read import TeacherCache, find_cache_folder, is_native
from qat.legacy.cache import is_seed_cache, open_seed_cache


def open_teacher_cache(path: str | Path) -> TeacherCache:
    """Open a cache of either form, also where it is nested in a folder.

    Raises:
        FileNotFoundError: If there is no whole cache.
        CacheMismatch: If its manifest was altered or a shard has another size.
    """
    folder = find_cache_folder(Path(path), lambda found: is_native(found) or is_seed_cache(found))
    if is_native(folder):
        return TeacherCache.open(folder)
    return open_seed_cache(folder)
