"""What `qat fetch` and `qat push` share: words to things in stores, and what is whole."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qat.storage import archive, stores
from qat.storage.files import read_json
from qat.storage.registry import STORE_FOLDERS, Kind, Shortcut, likely_kind, read_registry
from qat.tracking.messages import say

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True, slots=True)
class Errand:
    """One thing to get: what it is, where it goes, where it comes from."""

    word: str
    wanted: Shortcut
    target: Path
    found: stores.Found | None
    """None where it is here already."""


def plan_errands(
    words: Sequence[str], output_dir: Path | None, registry: Path | None, *, force: bool
) -> list[Errand]:
    """Look all words up, before anything long is done.

    Raises:
        FileNotFoundError: If a thing is nowhere, or no store is at hand; tells what was tried.
        ValueError: If a word is unknown.
    """
    shortcuts = read_registry(registry) if registry else read_registry()
    return [plan_errand(word, shortcuts, output_dir, force=force) for word in words]


def plan_errand(
    word: str, shortcuts: dict[str, Shortcut], output_dir: Path | None, *, force: bool
) -> Errand:
    """Look one word up: an address, a shortcut, or the name of something in a store."""
    if "://" in word or (word not in shortcuts and Path(word).exists()):
        wanted = of_address(word)
        target = wanted.local_path(output_dir)
        is_new = force or stores.read_receipt(target) is None
        return Errand(word, wanted, target, stores.locate_address(word) if is_new else None)
    wanted = shortcuts.get(word)
    options = [wanted] if wanted else [named(word, kind) for kind in STORE_FOLDERS]
    for option in options:
        target = option.local_path(output_dir)
        if not force and is_present(option, target):
            return Errand(word, option, target, None)
    known = ", ".join(shortcuts)
    found_stores = stores.find_stores()
    if not found_stores:
        what = "is not here" if wanted else f"is none of {known}, and not here"
        raise FileNotFoundError(f"{word} {what}, and there is no store; {stores.HOW_TO_GIVE}")
    for option in options:
        found = stores.locate(found_stores, option.store_folder, option.name, option.files)
        if found:
            return Errand(word, option, option.local_path(output_dir), found)
    tried = ", ".join(f"{store.name} ({store.base})" for store in found_stores)
    if wanted is None:
        raise ValueError(f"{word!r} is none of {known}, nor the name of anything in {tried}")
    raise FileNotFoundError(
        f"{word}: neither {wanted.name}.tar.lz4, .tgz nor a folder {wanted.name} lies in "
        f"{wanted.store_folder} of {tried}; `qat push` puts it there, or set QAT_STORE"
    )


def named(word: str, kind: Kind) -> Shortcut:
    """Return what a name in a store stands for."""
    return Shortcut(kind=kind, name=word.strip("/"))


def of_address(word: str) -> Shortcut:
    """Return what a path or URL stands for: its last part names it."""
    name = word.rstrip("/").rpartition("/")[2]
    stem = archive.archive_stem(name) if name.endswith(archive.SUFFIXES) else name
    return Shortcut(kind=likely_kind(word), name=stem)


def run_errand(errand: Errand) -> None:
    """Get one thing and check that it is what its word says.

    Raises:
        ValueError: If it is damaged or something else.
    """
    if errand.found is None:
        say(f"{errand.word}: {errand.target} is here and whole: nothing to do")
        return
    say(f"{errand.word}: taking {errand.found.address} into {errand.target}")
    wanted = errand.wanted
    is_exact = errand.found.address.endswith(f"/{wanted.lies_as}")
    stores.take(
        errand.found,
        errand.target,
        check=partial(check_content, wanted),
        sha256=wanted.sha256 if is_exact else None,
        files=wanted.files,
    )


def is_present(wanted: Shortcut, target: Path) -> bool:
    """Return whether a thing is here, whole, and the one that is wanted.

    What was taken from a store has a receipt; what was made or put here is opened and checked.
    """
    if not target.exists():
        return False
    receipt = stores.read_receipt(target)
    if receipt is None:
        try:
            check_content(wanted, target)
        except (ValueError, OSError) as error:
            say(f"{target} is not taken as it is ({error})")
            return False
        return True
    is_other = wanted.sha256 and receipt["source"].endswith(f"/{wanted.lies_as}")
    if is_other and receipt["sha256"] != wanted.sha256:
        return False
    return wanted.fingerprint in (None, recorded_fingerprint(target))


def recorded_fingerprint(folder: Path) -> str | None:
    """Return the fingerprint in a cache's manifest, None where there is none."""
    path = folder / MANIFEST_FILE
    return read_json(path).get("fingerprint") if path.is_file() else None


def check_content(wanted: Shortcut, folder: Path) -> None:
    """Refuse a folder that is no whole cache or checkpoint, or another one than wanted.

    Raises:
        ValueError: With what is wrong.
        OSError: If it is not there.
    """
    if wanted.kind == "checkpoint":
        check_checkpoint(folder)
        return
    from qat.pipelines.open_cache import open_teacher_cache

    fingerprint = open_teacher_cache(folder).fingerprint
    if wanted.fingerprint not in (None, fingerprint):
        raise ValueError(
            f"{folder} has fingerprint {fingerprint}, the registry says {wanted.fingerprint}; "
            "put the right cache in the store, or mend speedrun/registry.toml"
        )


def check_checkpoint(folder: Path) -> None:
    """Refuse a folder that holds no checkpoint, or a damaged one."""
    from qat.legacy.checkpoint import open_seed_checkpoint
    from qat.model.checkpoint import TENSORS_NAME, is_checkpoint, read_header
    from qat.pipelines.open_checkpoint import checkpoint_path
    from qat.storage.files import sha256_of_file

    path = checkpoint_path(folder)
    if path.is_file():
        open_seed_checkpoint(path)
    elif is_checkpoint(path) and read_header(path).sha256 != sha256_of_file(path / TENSORS_NAME):
        raise ValueError(f"{path / TENSORS_NAME} does not match its sha256; push and fetch again")


def closing(errands: Sequence[Errand]) -> dict[str, Any]:
    """Return the closing values: each path under its kind, and each thing by itself."""
    return {
        **{errand.wanted.kind: str(errand.target) for errand in errands},
        "fetched": [
            {
                "word": errand.word,
                "path": str(errand.target),
                "source": errand.found and errand.found.address,
                "skipped": errand.found is None,
            }
            for errand in errands
        ],
    }


def shortcut_for(name: str, kind: Kind, registry: Path | None) -> Shortcut:
    """Return what a thing is called in a store: a word's file, or the name itself.

    Raises:
        ValueError: If the word stands for something of the other kind.
    """
    shortcuts = read_registry(registry) if registry else read_registry()
    wanted = shortcuts.get(name) or named(name, kind)
    if wanted.kind != kind:
        raise ValueError(f"--name {name} stands for a {wanted.kind}, this is a {kind}")
    return replace(wanted, lies_as="")
