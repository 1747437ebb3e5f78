"""Files that are whole or absent: atomic writes, sha256, canonical JSON and its fingerprint."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FINGERPRINT_HEX = 16  # 64 bits: ample against accident, short enough for a folder name


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """Return 16 hex digits that name a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:FINGERPRINT_HEX]


def sha256_of_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex, without holding the file in memory."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Return the JSON value in a file.

    Raises:
        ValueError: If the file is not JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); remove it or make it again") from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value, indented, under its final name only when whole."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file under its final name only when whole."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it into place if the block succeeds.

    The former file stays whole until the rename, also when the disk fills up.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes it private
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`; swap it into place if the block succeeds.

    The former folder is whole at every moment: under its name, or for the instant between two
    renames under a hidden one, from which `settle_folder` brings it back.

    Raises:
        FileExistsError: If a file has that name.
    """
    path = Path(path)
    if path.is_file():
        raise FileExistsError(f"{path} is a file where a folder goes; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    settle_folder(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            flush_to_disk(file)
        if path.exists():
            path.rename(former_folder(path))
        temporary.rename(path)
        flush_to_disk(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        settle_folder(path)


def settle_folder(path: Path) -> None:
    """Finish what a process killed while replacing a folder left: put it back or clear it away."""
    former = former_folder(path)
    if not former.is_dir():
        return
    if path.exists():
        shutil.rmtree(former, ignore_errors=True)
    else:
        former.rename(path)


def former_folder(path: Path) -> Path:
    """Return where a folder stays while another takes its place."""
    path = Path(path).absolute()
    return path.with_name(f".{path.name}.old")


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
