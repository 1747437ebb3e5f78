"""What `fetch` and `push` share: what a folder holds, and whether it is whole and the right one."""

from pathlib import Path

from qat.storage.decode import object_in
from qat.storage.files import sha256_of_file
from qat.storage.receipt import read_receipt, receipt_path
from qat.storage.registry import Kind, StoredItem
from qat.tracking.messages import say

MANIFEST_FILE = "manifest.json"


def kind_of(path: Path) -> Kind:
    """Return what a path holds, told by its content: a cache has a manifest or shards."""
    from qat.cache.read import find_cache_folder, is_native
    from qat.legacy.cache import is_seed_cache

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a cache, a run or a checkpoint")
    try:
        find_cache_folder(path, lambda folder: is_native(folder) or is_seed_cache(folder))
    except FileNotFoundError:
        return "checkpoint"
    return "cache"


def is_present(expected: StoredItem, target: Path) -> bool:
    """Return whether an item is here, whole, and the expected one.

    What was taken from a store has a receipt; what was made or put here is opened and checked.
    """
    if not target.exists():
        return False
    receipt = read_receipt(target)
    if receipt is None:
        try:
            check_content(expected, target)
        except (ValueError, OSError) as error:
            if not receipt_path(target).is_file():
                raise FileExistsError(
                    f"{target} is here, but was not fetched and cannot be used ({error}); "
                    "move it away, or replace it with --force"
                ) from error
            say(f"{target} is not taken as it is ({error})")
            return False
        return True
    is_exact = expected.sha256 and receipt.source.endswith(f"/{expected.stored_as}")
    if is_exact and receipt.sha256 != expected.sha256:
        return False
    return expected.fingerprint in (None, recorded_fingerprint(target))


def recorded_fingerprint(folder: Path) -> str | None:
    """Return the fingerprint in a cache's manifest, None where there is none."""
    path = folder / MANIFEST_FILE
    return object_in(path).get("fingerprint") if path.is_file() else None


def check_content(expected: StoredItem, folder: Path) -> None:
    """Refuse a folder that is no whole cache or checkpoint, or another one than expected."""
    if expected.kind == "checkpoint":
        check_checkpoint(folder)
        return
    from qat.pipelines.open_cache import open_teacher_cache

    fingerprint = open_teacher_cache(folder).fingerprint
    if expected.fingerprint not in (None, fingerprint):
        raise ValueError(
            f"{folder} has fingerprint {fingerprint}, the registry says {expected.fingerprint}; "
            "put the right cache in the store, or correct speedrun/registry.toml"
        )


def check_checkpoint(folder: Path) -> None:
    """Refuse a folder that holds no checkpoint, or a damaged one."""
    from qat.legacy.checkpoint import open_seed_checkpoint
    from qat.model.checkpoint import TENSORS_NAME, is_checkpoint, read_header
    from qat.pipelines.open_checkpoint import checkpoint_path

    path = checkpoint_path(folder)
    if path.is_file():
        open_seed_checkpoint(path)
    elif is_checkpoint(path) and read_header(path).sha256 != sha256_of_file(path / TENSORS_NAME):
        raise ValueError(f"{path / TENSORS_NAME} does not match its sha256; push and fetch again")
