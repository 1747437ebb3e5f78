"""Stores of caches and checkpoints: find them, find a thing in them, take it, put it there.

A store is a folder or a URL with `qwen3_caches/` and `qwen3_runs/` in it. What is taken appears
under its name only when whole and checked; a hidden receipt next to it tells that it still is.
"""

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from qat.storage.archive import (
    SUFFIXES,
    ArchiveMismatch,
    archive_stem,
    extract_archive,
    sidecar,
    top_folder,
)
from qat.storage.download import (
    discard,
    download,
    file_info,
    is_file,
    is_folder,
    is_web,
    open_files,
    record_path,
    stated_sha256,
)
from qat.storage.files import (
    FolderInUse,
    folder_lock,
    read_json,
    recover_interrupted_replace,
    replace_folder,
    sweep_half_made,
)
from qat.storage.receipt import receipt_path, write_receipt

LOGGER = logging.getLogger("qat")
COLAB_DRIVE = Path("/content/drive/MyDrive")
CONFIG_FILES = ("config.json",)  # next to a checkpoint of one file
HOW_TO_GIVE = (
    "set QAT_STORE to a folder or URL (gs://bucket, s3://bucket, https://host/path) that holds "
    "qwen3_caches and qwen3_runs, mount Drive on Colab, or set GDRIVE_PATH or GCS_BUCKET"
)


@dataclass(frozen=True, slots=True)
class Store:
    """A place that holds caches and checkpoints."""

    name: str
    """How it was found."""
    base: str
    """Folder or URL, without a slash at its end."""

    def address(self, *parts: str) -> str:
        """Return the path or URL of something in it."""
        return "/".join((self.base, *parts))


@dataclass(frozen=True, slots=True)
class Found:
    """A thing in a store, or at an address."""

    address: str
    form: Literal["archive", "folder", "file"]


def named_store(value: str, name: str) -> Store:
    """Return the store at a path or URL."""
    if "://" in value and not value.startswith("file://"):
        return Store(name, value.rstrip("/"))
    folder = Path(value.removeprefix("file://")).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{name} {value} is no folder; mount it, or name another store")
    return Store(name, str(folder))


def find_stores(environment: Mapping[str, str] = os.environ) -> list[Store]:
    """Return the stores that there are, in the order they are tried."""
    mount = Path(environment.get("HOME") or Path.home()) / "gdrive"
    bucket = environment.get("GCS_BUCKET", "").removeprefix("gs://")
    places = {
        "QAT_STORE": environment.get("QAT_STORE"),
        "Colab's Drive": COLAB_DRIVE.is_dir() and str(COLAB_DRIVE),
        "GDRIVE_PATH": environment.get("GDRIVE_PATH"),
        "~/gdrive": mount.is_dir() and str(mount),  # where rclone mounts Drive
        "GCS_BUCKET": bucket and f"gs://{bucket}",
    }
    return [named_store(place, name) for name, place in places.items() if place]


def locate(
    stores: Sequence[Store], folder: str, name: str, files: Sequence[str] = ()
) -> Found | None:
    """Return a thing in the first store that has it: .tar.lz4, then .tgz, then a plain folder.

    A name with a suffix is that archive alone, one that ends in .pt that file. `files` are those of
    a plain folder, for stores that cannot list; the first of them decides.

    Raises:
        PermissionError: If none has it, and one of them refused to tell.
    """
    refused: list[PermissionError] = []

    def is_there(probe: Callable[[str], bool], address: str) -> bool:
        try:
            return probe(address)
        except PermissionError as error:
            refused.append(error)
            return False

    for store in stores:
        address = store.address(folder, name)
        for suffix in ("",) if name.endswith(SUFFIXES) else SUFFIXES:
            if is_there(is_file, address + suffix):
                return Found(address + suffix, "archive")
        if name.endswith(".pt") and is_there(is_file, address):
            return Found(address, "file")
        by_file = is_web(address) and files
        if is_there(is_file, f"{address}/{files[0]}") if by_file else is_there(is_folder, address):
            return Found(address, "folder")
    if refused:
        raise refused[0]
    return None


def locate_address(address: str) -> Found:
    """Return the thing at a path or URL."""
    if is_folder(address):
        return Found(address.rstrip("/"), "folder")
    if not is_file(address):
        raise FileNotFoundError(f"{address} does not exist; check its name")
    archive_stem(address)
    return Found(address, "archive")


def take(
    found: Found,
    folder: Path,
    choose_target: Callable[[Path], Path],
    *,
    sha256: str | None = None,
    files: Sequence[str] = (),
) -> Path:
    """Make a folder of a thing in a store, in the place of what may be there.

    It is copied to this disk first; copies continue where an earlier call was cut short.

    Args:
        found: What `locate` gave.
        folder: Where copies grow, under hidden names.
        choose_target: From the new folder, not named yet, to its final path, which is returned;
            raises where it is not what was expected, and then nothing is replaced.
        sha256: Of the archive, where it is known otherwise than from the store.
        files: What a plain folder on a web server holds.

    Raises:
        ArchiveMismatch: If a checksum differs or the archive is cut; the copy of it is removed.
        ValueError: If another process takes the same thing.
        OSError: If the disk is too small or the connection breaks.
    """
    name = PurePosixPath(found.address).name
    staging = folder / f".{name}.fetching"
    with folder_lock(folder / name):
        digest = None
        if found.form == "archive":
            digest = fetch_archive(found.address, folder / f".{name}", staging, sha256)
        elif found.form == "file":
            copy_files(found.address.removesuffix(f"/{name}"), staging, (name, *CONFIG_FILES))
        else:
            copy_files(found.address, staging, files if is_web(found.address) else ())
        try:
            made = top_folder(staging)
            target = choose_target(made)
            place_folder(made, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        write_receipt(target, found.address, digest)
    return target


def fetch_archive(address: str, copy: Path, staging: Path, sha256: str | None) -> str:
    """Extract an archive out of a store; return its checksum."""
    is_verified = sha256 is not None or stated_sha256(address) is not None
    digest = download(address, copy, sha256=sha256)
    if not is_verified:
        LOGGER.info(f"{address} is unverified: no checksum is known of it; it has sha256 {digest}")
    try:
        extract_archive(copy, staging)
    except ArchiveMismatch:
        discard(copy)
        raise
    discard(copy)
    return digest


def copy_files(address: str, staging: Path, names: Sequence[str]) -> None:
    """Copy a plain folder, or files of it by name; what an earlier call has copied whole stays.

    Of several names the first must be there.
    """
    inside = staging / PurePosixPath(address).name
    if names:
        pairs = [(f"{address}/{name}", name) for name in names]
        pairs = pairs[:1] + [pair for pair in pairs[1:] if is_seen(pair[0])]
    else:
        files, root = open_files(address)
        found = [path for path in files.find(root) if not path.endswith(".sha256")]
        pairs = [(files.unstrip_protocol(path), path[len(root) :].lstrip("/")) for path in found]
    if not pairs:
        raise FileNotFoundError(f"{address} is an empty folder; push there again")
    for source, name in pairs:
        if ".." in PurePosixPath(name).parts:
            raise ArchiveMismatch(f"{address}: {name!r} reaches outside; refused")
        download(source, inside / name)
    records = [record_path(inside / name) for _, name in pairs]
    unknown = [name for (_, name), path in zip(pairs, records, strict=True) if not states(path)]
    if unknown:
        LOGGER.info(f"{address} is unverified: no checksum is known of {', '.join(unknown[:3])}")
    for path in records:
        path.unlink()


def is_seen(address: str) -> bool:
    """Return whether there is a file that may be read; say so where a store does not tell."""
    try:
        return is_file(address)
    except PermissionError:
        LOGGER.info(f"{address} is not there, or may not be read: it is left out")
        return False


def states(record: Path) -> bool:
    """Return whether the record of a download has the checksum that the store states."""
    return "sha256" in read_json(record)


def place_folder(made: Path, target: Path) -> None:
    """Give a whole folder its name, also on another disk, in place of the previous one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    recover_interrupted_replace(target)
    near = target.with_name(f".{target.name}.placing")
    shutil.rmtree(near, ignore_errors=True)  # what a kill left
    shutil.move(made, near)
    receipt_path(target).unlink(missing_ok=True)
    replace_folder(near, target)


def sweep_taken(target: Path) -> None:
    """Remove what a process left that was killed after it gave a thing its name."""
    for ending in ("", *SUFFIXES):
        folder = target.with_name(target.name + ending)
        left = folder.with_name(f".{folder.name}.fetching")
        if left.is_dir():
            with suppress(FolderInUse), folder_lock(folder, patience_seconds=0):
                shutil.rmtree(left, ignore_errors=True)
    sweep_half_made(receipt_path(target))


def require_writable(store: Store) -> None:
    """Refuse a store that takes nothing."""
    if is_web(store.base):
        raise ValueError(f"--store {store.base} can only be read; give a folder or a bucket")
    open_files(store.base)


def put(archive: Path, store: Store, folder: str) -> str:
    """Copy an archive and its checksum into a store; return where it lies now.

    It gets its name when all of it is there, so a copy that is cut off leaves the previous one.
    """
    require_writable(store)
    address = store.address(folder, archive.name)
    files, path = open_files(store.address(folder))
    files.makedirs(path, exist_ok=True)
    final, part = f"{path}/{archive.name}", f"{path}/.{archive.name}.part"
    files.put_file(str(archive), part)
    files.invalidate_cache()
    if files.size(part) != archive.stat().st_size:
        raise OSError(f"{store.address(folder)} took only a part of {archive.name}; push again")
    # A new archive next to the checksum of the previous one would be refused, so that goes first.
    if file_info(f"{address}.sha256"):
        files.rm_file(f"{final}.sha256")
    files.mv(part, final)
    files.pipe_file(f"{final}.sha256", sidecar(archive).read_bytes())
    return address
