"""Files that are whole or absent: atomic writes, locks, sha256, canonical JSON, fingerprints."""

import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

FINGERPRINT_HEX = 16  # 64 bits: ample against accident, short enough for a folder name
FREE_MARGIN_BYTES = 64 << 20  # left free, so that a full disk does not take the system along
MOST_OWNER_LETTERS = 200  # of who holds a lock: it stands in a line
MOST_JSON_BYTES = 1 << 28  # a manifest of a million shards; more is no header of anything
PLAIN_NAME = re.compile(r"(?!\.)[^/\\:\x00-\x1f]{1,255}")
LEFT_ENDINGS = (".part", ".part.json", ".lock", ".old", ".fetching", ".placing", ".extracting")
MADE_HALF = re.compile(r"\.(.+?)(\.[^.]{8})?\.part")  # mkstemp's random letters are eight
DISK_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
TORCH_WRITER = "inline_container"  # torch's file that a failed write names in the system's place
LOCK_SECONDS = 0.2  # enough to retry where a lock file is replaced while it is being opened


class FolderInUse(ValueError):  # noqa: N818 as CacheMismatch
    """Another process has locked a folder."""


def canonical_json(value: object) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: object) -> str:
    """Return 16 hex digits that name a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:FINGERPRINT_HEX]


def sha256_of_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex, without holding the file in memory."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Return the JSON value in a file."""
    if (num_bytes := Path(path).stat().st_size) > MOST_JSON_BYTES:
        raise ValueError(f"{path} has {num_bytes:,} bytes, too many for JSON; make it again")
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); remove it or make it again") from error


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: If it is none, or nested too deeply, or has a number that JSON does not know.
    """
    try:
        return json.loads(text, parse_constant=refuse_constant, parse_float=finite_float)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def finite_float(text: str) -> float:
    """Return a number of JSON; refuse one that a float holds as infinity."""
    if math.isinf(number := float(text)):
        refuse_constant(text)
    return number


def refuse_constant(name: str) -> None:
    """Refuse NaN and infinity, which Python reads where JSON has no such numbers."""
    raise ValueError(f"{name} is no number of JSON")


def write_json(path: Path, value: object) -> None:
    """Write a JSON value, indented, under its final name only when whole."""
    try:
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    except ValueError as error:
        raise ValueError(
            f"{path} would hold NaN or infinity: the model computes no finite numbers; use "
            "--dtype fp32, or one that was trained with a lower rate"
        ) from error
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file under its final name only when whole."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path next to `path`; rename it into place if the block succeeds.

    The previous file stays whole until the rename, also when the disk fills up.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with hold(temporary):
            yield temporary
            temporary.chmod(0o644)  # mkstemp makes it private
            flush_to_disk(temporary)
            temporary.replace(path)
        flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder next to `path`; swap it into place if the block succeeds."""
    path = Path(path)
    if path.is_file():
        raise FileExistsError(f"{path} is a file where a folder goes; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_half_made(path)
    recover_interrupted_replace(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        with hold(temporary):
            yield temporary
            temporary.chmod(0o755)
            for file in temporary.rglob("*"):
                flush_to_disk(file)
            replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_output(path: Path) -> Iterator[Path]:
    """Give a place for a file or folder that is not there yet, next to which further files may go.

    If the block succeeds all get their names next to `path`, which comes last: where it is, the
    others are.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_half_made(path)
    made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        with hold(made):
            yield made / path.name
            for part in sorted(made.iterdir(), key=lambda part: part.name == path.name):
                part.replace(path.with_name(part.name))
        flush_to_disk(path.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):  # it holds what was made
                folder.rmdir()


def replace_folder(made: Path, path: Path) -> None:
    """Give a whole folder its final name, in place of the previous one.

    The previous folder is whole at every moment: under its name, or for the instant between two
    renames under a hidden one, from which `recover_interrupted_replace` brings it back.
    """
    try:
        if path.exists():
            path.rename(previous_folder(path))
        made.rename(path)
        flush_to_disk(path.parent)
    finally:
        recover_interrupted_replace(path)


def recover_interrupted_replace(path: Path) -> None:
    """Finish what a process killed in `replace_folder` left: restore or remove the previous one."""
    previous = previous_folder(path)
    if previous.is_dir() and path.exists():
        shutil.rmtree(previous, ignore_errors=True)
    elif previous.is_dir():
        previous.rename(path)


def previous_folder(path: Path) -> Path:
    """Return where a folder stays while another takes its place."""
    path = Path(path).absolute()
    return path.with_name(f".{path.name}.old")


@contextmanager
def folder_lock(folder: Path, *, patience_seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the lock of a folder, which the system releases when the process dies.

    The lock file lies next to the folder and stays there: a lock file that is removed lets a
    process that has the old one open and a process that makes a new one in at the same time. For
    where somebody else removes it, the folder itself is locked as well.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = lock_file(folder)
    lock = FileLock(path, timeout=patience_seconds)
    try:
        lock.acquire()
    except Timeout as error:
        raise FolderInUse(f"{folder} is in use by {lock_owner(path)}; wait for it") from error
    try:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
        with suppress(OSError):  # a full disk costs the message, not the lock
            path.write_text(canonical_json(owner), encoding="utf-8")
        with hold(folder):
            yield
    finally:
        lock.release()


def lock_file(folder: Path) -> Path:
    """Return the file that is locked in a folder's place, before there is one and after."""
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Lock the entry of a folder or file on the disk, where there is one and the system can."""
    try:
        import fcntl

        handle = os.open(path, os.O_RDONLY)
    except (ImportError, OSError):  # Windows, or nothing there yet
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderInUse(f"{path} is in use by another process; wait for it") from error
        except OSError:  # some mounted drives lock nothing
            pass
        yield
    finally:
        os.close(handle)


def lock_owner(path: Path) -> str:
    """Return who holds a lock, as far as its file tells."""
    try:
        owner = read_json(path)
        told = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        told = ""
    is_plain = told.isprintable() and 0 < len(told) < MOST_OWNER_LETTERS
    return told if is_plain else "another process"


def is_leftover(path: Path) -> bool:
    """Return whether a path is what a killed process left half made, or only served to make it."""
    return path.name.startswith(".") and path.name.endswith(LEFT_ENDINGS)


def sweep_half_made(path: Path) -> None:
    """Remove what killed processes left of a file or folder of this name, which none holds."""
    for half in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        found = MADE_HALF.fullmatch(half.name)
        if found and found[1] == path.name:
            with suppress(FolderInUse), hold(half):
                remove(half)


def sweep_leftovers(folder: Path) -> None:
    """Remove what killed processes left half made in a folder that this one has locked.

    A previous folder whose place was being taken is put back, where its place is empty. What
    another process holds stays as it is: a folder that it has locked, with all that is in it or
    half made next to it, and what it is making.
    """
    for path in sorted(Path(folder).glob("*")):
        with suppress(FolderInUse):
            if path.name.startswith(".") and path.name.endswith(".old"):
                place = path.with_name(path.name[1 : -len(".old")])
                with hold_unlocked(place):
                    recover_interrupted_replace(place)
            elif half := MADE_HALF.fullmatch(path.name):
                with hold_unlocked(path.with_name(half[1])), hold(path):
                    remove(path)
            elif path.is_dir() and not path.is_symlink():
                with hold_unlocked(path):
                    sweep_leftovers(path)


@contextmanager
def hold_unlocked(folder: Path) -> Iterator[None]:
    """Hold a folder that no other process has locked; no lock file appears where there is none."""
    is_known = lock_file(folder).is_file()
    with folder_lock(folder, patience_seconds=0) if is_known else hold(folder):
        yield


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is still there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def require_plain_name(name: str, flag: str) -> None:
    """Refuse what is not one part of a path, so that nothing lands outside its folder."""
    if not PLAIN_NAME.fullmatch(name):
        raise ValueError(f"{flag} {name!r} is no plain name; leave out slashes and dots before it")


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that it came from, says that a disk takes no more."""
    while error is not None:
        if getattr(error, "errno", None) in DISK_FULL or TORCH_WRITER in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Refuse to start what the disk cannot hold."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes + FREE_MARGIN_BYTES:
        raise OSError(
            f"{what} needs {num_bytes:,} bytes and {folder} has {free:,} free; free some space"
        )


def flush_to_disk(path: Path) -> None:
    """Make a written file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():  # mounted drives refuse to flush folders; that costs no content
            raise
    finally:
        os.close(handle)
