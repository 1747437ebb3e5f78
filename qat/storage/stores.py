"""Stores of caches and checkpoints: find them, find a thing in them, take it, put it there.

A store is a folder or a URL with `qwen3_caches/` and `qwen3_runs/` in it. What is taken appears
under its name only when whole and checked; a hidden receipt beside it tells that it still is.
"""

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from qat.storage.archive import (
    SUFFIXES,
    ArchiveMismatch,
    copy_archive,
    extract_archive,
    open_files,
    sidecar,
    stated_sha256,
)
from qat.storage.files import former_folder, read_json, settle_folder, sha256_of_file, write_json

COLAB_DRIVE = Path("/content/drive/MyDrive")
RCLONE_FOLDER = "gdrive"  # below the home folder
MOUNTS = Path("/proc/mounts")
NETWORK_FILE_SYSTEMS = ("fuse", "nfs", "cifs", "smb", "9p", "ceph", "lustre", "gcsfuse", "drvfs")
CONFIG_FILES = ("config.json",)  # beside a checkpoint of one file
HOW_TO_GIVE = (
    "set QAT_STORE to a folder or URL (gs://bucket, s3://bucket, https://host/path) that holds "
    "qwen3_caches and qwen3_runs, mount Drive on Colab, or set GDRIVE_PATH or GCS_BUCKET"
)

Environment = Mapping[str, str]
Form = Literal["archive", "folder", "file"]


@dataclass(frozen=True, slots=True)
class Store:
    """A place that holds things."""

    name: str
    """How it was found."""
    base: str
    """Folder or URL, without a slash at its end."""
    is_remote: bool
    """Whether it is read over a network, also where it is mounted as a folder."""

    def address(self, *parts: str) -> str:
        """Return the path or URL of something in it."""
        return "/".join((self.base, *parts))


@dataclass(frozen=True, slots=True)
class Found:
    """A thing in a store."""

    address: str
    form: Form
    is_remote: bool


def from_variable(environment: Environment, variable: str) -> Store | None:
    """Return the store that a variable names, None where it is not set.

    Raises:
        FileNotFoundError: If it names a folder that is not there.
    """
    value = environment.get(variable, "")
    return named_store(value, variable) if value else None


def named_store(value: str, name: str) -> Store:
    """Return the store at a path or URL.

    Raises:
        FileNotFoundError: If it is a folder that is not there.
    """
    if "://" in value and not value.startswith("file://"):
        return Store(name, value.rstrip("/"), is_remote=True)
    folder = Path(value.removeprefix("file://")).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{name} {value} is no folder; mount it, or name another store")
    return Store(name, value.rstrip("/") if "://" in value else str(folder), is_network(folder))


def qat_store(environment: Environment) -> Store | None:
    """Return the store that QAT_STORE names: a folder, or a URL that fsspec opens."""
    return from_variable(environment, "QAT_STORE")


def colab_drive(_environment: Environment) -> Store | None:
    """Return Google Drive where a Colab notebook mounts it."""
    return Store("Colab's Drive", str(COLAB_DRIVE), True) if COLAB_DRIVE.is_dir() else None


def gdrive_path(environment: Environment) -> Store | None:
    """Return a Drive mounted elsewhere, which GDRIVE_PATH names."""
    found = from_variable(environment, "GDRIVE_PATH")
    return found and Store(found.name, found.base, True)


def rclone_mount(environment: Environment) -> Store | None:
    """Return an rclone mount at ~/gdrive."""
    folder = Path(environment.get("HOME") or Path.home()) / RCLONE_FOLDER
    return Store(f"~/{RCLONE_FOLDER}", str(folder), True) if folder.is_dir() else None


def gcs_bucket(environment: Environment) -> Store | None:
    """Return the bucket that GCS_BUCKET names, with or without gs://."""
    bucket = environment.get("GCS_BUCKET", "").removeprefix("gs://").rstrip("/")
    return Store("GCS_BUCKET", f"gs://{bucket}", True) if bucket else None


STORES: dict[str, Callable[[Environment], Store | None]] = {  # in the order they are tried
    "QAT_STORE": qat_store,
    "Colab's Drive": colab_drive,
    "GDRIVE_PATH": gdrive_path,
    "~/gdrive": rclone_mount,
    "GCS_BUCKET": gcs_bucket,
}


def find_stores(environment: Environment = os.environ) -> list[Store]:
    """Return the stores that there are, in the order they are tried."""
    return [store for find in STORES.values() if (store := find(environment))]


def is_network(folder: Path) -> bool:
    """Return whether a folder lies on a network mount, as far as the system tells."""
    path = folder.resolve()
    if sys.platform == "darwin":
        return "CloudStorage" in path.parts
    if not MOUNTS.is_file():
        return False
    points = [line.split()[1:3] for line in MOUNTS.read_text().splitlines()]
    above = [(len(point), kind) for point, kind in points if path.is_relative_to(point)]
    return max(above, default=(0, ""))[1].startswith(NETWORK_FILE_SYSTEMS)


def locate(
    stores: Sequence[Store], folder: str, name: str, files: Sequence[str] = ()
) -> Found | None:
    """Return a thing in the first store that has it: .tar.lz4, then .tgz, then a plain folder.

    A name that ends in .pt is that file.

    Args:
        stores: In the order they are tried.
        folder: Of the store.
        name: Without suffix; with one, that archive alone.
        files: What a plain folder holds, for stores that cannot list; the first of them decides.
    """
    for store in stores:
        is_archive = name.endswith(SUFFIXES)
        for suffix in ("",) if is_archive else SUFFIXES:
            address = store.address(folder, name + suffix)
            if exists(address):
                return Found(address, "archive", store.is_remote)
        address = store.address(folder, name)
        if name.endswith(".pt") and exists(address):
            return Found(address, "file", store.is_remote)
        if exists(f"{address}/{files[0]}") if is_web(address) and files else is_folder(address):
            return Found(address, "folder", store.is_remote)
    return None


def locate_address(address: str) -> Found:
    """Return the thing at a path or URL.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If it is a file, but no archive.
    """
    is_url = "://" in address and not address.startswith("file://")
    is_remote = is_url or is_network(Path(address.removeprefix("file://")))
    if is_folder(address):
        return Found(address.rstrip("/"), "folder", is_remote)
    if not exists(address):
        raise FileNotFoundError(f"{address} does not exist; check its name")
    if not address.endswith(SUFFIXES):
        raise ValueError(f"{address} does not end in {', '.join(SUFFIXES)}; give an archive")
    return Found(address, "archive", is_remote)


def exists(address: str) -> bool:
    """Return whether there is a file at a path or URL."""
    files, path = open_files(address)
    return files.exists(path) if is_web(address) else files.isfile(path)


def size_of(address: str) -> int:
    """Return the bytes of a file at a path or URL."""
    files, path = open_files(address)
    return files.size(path)


def is_folder(address: str) -> bool:
    """Return whether there is a folder at a path or URL; the web has none."""
    if is_web(address):
        return False
    files, path = open_files(address)
    return files.isdir(path)


def is_web(address: str) -> bool:
    """Return whether an address is a web server's, which neither lists nor takes files."""
    return address.startswith(("http://", "https://"))


def receipt_path(target: Path) -> Path:
    """Return where the receipt of something taken lies: beside it."""
    return target.with_name(f".{target.name}.fetched.json")


def take(
    found: Found,
    target: Path,
    *,
    check: Callable[[Path], None],
    sha256: str | None = None,
    files: Sequence[str] = (),
) -> None:
    """Make a folder of a thing in a store, in the place of what may be there.

    Archives in remote stores are copied to this disk first; copies go on where an earlier call
    was cut short.

    Args:
        found: What `locate` gave.
        target: The folder.
        check: Raises where a folder is not what was wanted; then nothing is replaced.
        sha256: Of the archive, where it is known otherwise than from the store.
        files: What a plain folder on a web server holds.

    Raises:
        ArchiveMismatch: If a checksum differs or the archive is cut; a copy of it is removed.
        OSError: If the disk is too small or the connection breaks.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    settle_folder(target)
    staging = target.with_name(f".{target.name}.fetching")
    if found.form == "file":
        address, _, name = found.address.rpartition("/")
        copy_files(address, staging, (name, *CONFIG_FILES))
        digest = None
    elif found.form == "folder":
        copy_files(found.address, staging, files if is_web(found.address) else ())
        digest = None
    else:
        digest = unpack(found, staging, sha256)
    made = unnested(staging, target.name)
    try:
        check(made)
    except (ValueError, OSError):
        shutil.rmtree(staging)
        raise
    replace_folder(made, target)
    shutil.rmtree(staging, ignore_errors=True)
    sizes = {str(path.relative_to(target)): stamp(path) for path in files_below(target)}
    write_json(receipt_path(target), {"source": found.address, "sha256": digest, "files": sizes})


def unpack(found: Found, staging: Path, sha256: str | None) -> str:
    """Extract an archive, copied first where it is remote; return its checksum."""
    into = staging.parent
    local = Path(found.address.removeprefix("file://"))
    if found.is_remote:
        local = copy_archive(found.address, into / PurePosixPath(found.address).name)
    try:
        # What the store states is checked on extraction, which saves reading all of it once more.
        digest = stated_sha256(*open_files(str(local))) or sha256_of_file(local)
        if sha256 not in (None, digest):
            raise ArchiveMismatch(
                f"{found.address} has sha256 {digest}, the registry says {sha256}; "
                "put the right file there, or mend speedrun/registry.toml"
            )
        shutil.rmtree(staging, ignore_errors=True)  # what a kill left
        extract_archive(local, into, name=staging.name)
    except ArchiveMismatch:
        if found.is_remote:
            discard(local)
        raise
    if found.is_remote:
        discard(local)
    return digest


def discard(copy: Path) -> None:
    """Remove a copied archive and its checksum."""
    copy.unlink()
    sidecar(copy).unlink(missing_ok=True)


def copy_files(address: str, staging: Path, names: Sequence[str]) -> None:
    """Copy a plain folder, or files of it by name; what an earlier call has copied whole stays.

    Of several names the first must be there.
    """
    if names:
        pairs = [(f"{address}/{name}", name) for name in names]
        pairs = [pair for number, pair in enumerate(pairs) if not number or exists(pair[0])]
    else:
        files, root = open_files(address)
        found = [path for path in files.find(root) if not path.endswith(".sha256")]
        pairs = [(files.unstrip_protocol(path), path[len(root) :].lstrip("/")) for path in found]
    if not pairs:
        raise FileNotFoundError(f"{address} is an empty folder; push there again")
    for source, name in pairs:
        if ".." in PurePosixPath(name).parts:
            raise ArchiveMismatch(f"{address}: {name!r} reaches outside; refused")
        there = staging / name
        if there.is_file() and there.stat().st_size != size_of(source):
            there.unlink()
        copy_archive(source, there)


def unnested(folder: Path, name: str) -> Path:
    """Return the folder that holds the content of one that may be nested in its like."""
    items = list(folder.iterdir())
    if len(items) == 1 and items[0].is_dir() and items[0].name == name:
        return unnested(items[0], name)
    return folder


def replace_folder(made: Path, target: Path) -> None:
    """Give a whole folder its name, in the place of the former one."""
    former = former_folder(target)
    receipt_path(target).unlink(missing_ok=True)
    if target.exists():
        target.rename(former)
    made.rename(target)
    settle_folder(target)


def files_below(folder: Path) -> list[Path]:
    """Return all files of a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def stamp(path: Path) -> list[int]:
    """Return a file's size and time, which change when it does."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def read_receipt(target: Path) -> dict[str, Any] | None:
    """Return the receipt of something taken if all that was taken is there unchanged."""
    settle_folder(target)
    path = receipt_path(target)
    if not (path.is_file() and target.is_dir()):
        return None
    receipt = read_json(path)
    is_whole = all(
        (target / name).is_file() and stamp(target / name) == then
        for name, then in receipt["files"].items()
    )
    return receipt if is_whole else None


def require_writable(store: Store) -> None:
    """Refuse a store that takes nothing.

    Raises:
        ValueError: If it is a web server, or no installed package opens its URL.
    """
    if is_web(store.base):
        raise ValueError(f"--store {store.base} can only be read; give a folder or a bucket")
    open_files(store.base)


def put(archive: Path, store: Store, folder: str) -> str:
    """Copy an archive and its checksum into a store; return where it lies now.

    It gets its name when all of it is there, so a copy that is cut off leaves the former one.

    Raises:
        ValueError: If nothing can be put there.
        OSError: If the copy has another size than the archive.
    """
    require_writable(store)
    files, path = open_files(store.address(folder))
    files.makedirs(path, exist_ok=True)
    final, part = f"{path}/{archive.name}", f"{path}/.{archive.name}.part"
    files.put_file(str(archive), part)
    files.invalidate_cache()
    if files.size(part) != archive.stat().st_size:
        raise OSError(f"{store.address(folder)} took only a part of {archive.name}; push again")
    # A new archive beside the checksum of the former one would be refused, so that goes first.
    if files.exists(f"{final}.sha256"):
        files.rm_file(f"{final}.sha256")
    files.mv(part, final)
    files.pipe_file(f"{final}.sha256", sidecar(archive).read_bytes())
    return store.address(folder, archive.name)
