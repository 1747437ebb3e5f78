"""What a cache's path stands for: a native cache, or one of the seeds' form."""

from pathlib import Path

from qat.cache.read import TeacherCache, find_cache_folder, is_native
from qat.legacy.cache import is_seed_cache, open_seed_cache
from qat.model.load import load_tokenizer, vocabulary_size
from qat.storage.addresses import as_address


def open_teacher_cache(path: str | Path) -> TeacherCache:
    """Open a cache of either form, also where it is nested in a folder, or ours at an address.

    Raises:
        FileNotFoundError: If there is no whole cache.
        CacheMismatch: If its manifest was altered or a shard has another size.
    """
    if as_address(path):
        return TeacherCache.open(path)
    folder = find_cache_folder(Path(path), lambda found: is_native(found) or is_seed_cache(found))
    if is_native(folder):
        return TeacherCache.open(folder)
    return open_seed_cache(folder)


def open_cache(
    folder: Path | None, text_folder: Path, weights: str | None = None
) -> TeacherCache | None:
    """Return the cache in a folder, refused unless it is of a model's tokenizer and teacher.

    Args:
        folder: None gives None.
        text_folder: Of the model's tokenizer, not read where the cache says nothing of its own.
        weights: Hash of the full-precision model's weights; None is not compared.
    """
    if folder is None:
        return None
    vocab_size = vocabulary_size(text_folder)  # first: a damaged folder is reported as such
    cache = open_teacher_cache(folder)
    identity = cache.manifest.identity
    if identity.tokenizer_sha256 or identity.template_sha256:
        cache.require_tokenizer(load_tokenizer(text_folder))
    cache.require_vocabulary(vocab_size)
    cache.require_teacher(weights)
    return cache
