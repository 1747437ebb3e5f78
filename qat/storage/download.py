"""Downloads from any path or URL that fsspec opens: resumed, checked, whole or absent."""

import logging
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import fsspec
from tqdm import tqdm

from qat.storage.archive import MOST_CHECKSUM_BYTES, ArchiveMismatch, parse_checksum
from qat.storage.files import (
    flush_to_disk,
    read_json,
    require_space,
    sha256_of_file,
    sweep_half_made,
    write_json,
)

TIMEOUT_SECONDS = 60  # without one byte
TRIES = 3  # in a row, without one byte
WAIT_SECONDS = 1
CHUNK_BYTES = 1 << 20
ABSENT = (404, 410)
FORBIDDEN = (401, 403)
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
LOOPBACK = ("127.0.0.1", "[::1]", "localhost")
LOGGER = logging.getLogger("qat")
# What file systems tell of a file that changes when it does; each tells some of them.
VERSION_FIELDS = ("size", "mtime", "created", "ETag", "Last-Modified", "LastModified")
VERSION_FIELDS += ("Content-MD5", "etag", "md5Hash", "generation", "blob_id")
# What file systems let through of the libraries that they stand on, none of it an OSError.
LIBRARY_ERRORS = {
    "aiohttp": "ClientError",
    "botocore.exceptions": "BotoCoreError",
    "gcsfs.retry": "HttpError",
    "httpx": "HTTPError",
}


@contextmanager
def reaching(address: str) -> Iterator[None]:
    """Raise as OSError whatever a store's libraries raise inside the block.

    Raises:
        ConnectionError: In place of an error of a library.
    """
    try:
        yield
    except library_errors() as error:
        if isinstance(error, OSError):
            raise
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConnectionError(
            f"{address} cannot be reached ({why}); check the address, the credentials and the "
            "network"
        ) from error


def library_errors() -> tuple[type[Exception], ...]:
    """Return the errors of the libraries that are loaded by now."""
    loaded = [(sys.modules.get(module), name) for module, name in LIBRARY_ERRORS.items()]
    return tuple(getattr(module, name) for module, name in loaded if module)


def open_files(address: str) -> tuple[Any, str]:
    """Return the file system of a path or URL, and its path there."""
    options = {}
    if is_web(address):
        import aiohttp

        # aiohttp ends every answer after 5 minutes and ignores proxies unless told otherwise.
        seconds = TIMEOUT_SECONDS
        timeout = aiohttp.ClientTimeout(None, sock_connect=seconds, sock_read=seconds)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    try:
        return fsspec.url_to_fs(address, **options)
    except ImportError as error:
        raise ValueError(f"{address} needs another package: {error}") from error


def is_web(address: str) -> bool:
    """Return whether an address is a web server's, which neither lists nor takes files."""
    return address.startswith(("http://", "https://"))


def file_info(address: str) -> dict[str, Any] | None:
    """Return what is known of a file or folder, None where there is none.

    Raises:
        ConnectionError: If a web server cannot be reached or fails.
        PermissionError: If it refuses to tell.
    """
    files, path = open_files(address)
    try:
        with reaching(address):
            return files.info(path)
    except NotADirectoryError:
        return None
    except FileNotFoundError as error:
        # fsspec says so of every failure of a web server; the cause tells which one it was.
        cause = error.__cause__ if is_web(address) else None
        status = getattr(cause, "status", None)
        if cause is None or status in ABSENT:
            return None
        if status in FORBIDDEN:
            raise PermissionError(
                f"{address} is refused ({status}): it is private, or it is not there and the store "
                "does not tell; check the address and your credentials"
            ) from error
        raise ConnectionError(
            f"{address} cannot be reached ({cause}); check the address and the network"
        ) from error


def is_file(address: str) -> bool:
    """Return whether there is a file at a path or URL."""
    info = file_info(address)
    return info is not None and info["type"] == "file"


def may_be_seen(address: str) -> bool:
    """Return whether there is a file that a store tells of.

    Of a bucket that may not be listed, what is not there looks like what is private.
    """
    try:
        return is_file(address)
    except PermissionError:
        return False


def is_folder(address: str) -> bool:
    """Return whether there is a folder at a path or URL; the web has none."""
    info = None if is_web(address) else file_info(address)
    return info is not None and info["type"] == "directory"


def stated_sha256(address: str) -> str | None:
    """Return the checksum next to a file, None where there is none that a store tells of."""
    checksum = f"{address}.sha256"
    if not may_be_seen(checksum):
        return None
    info = file_info(checksum) or {"size": None}
    if (info["size"] or 0) > MOST_CHECKSUM_BYTES:
        raise ArchiveMismatch(f"{checksum} has {info['size']:,} bytes and holds no sha256; fix it")
    files, path = open_files(checksum)
    streamed = {"block_size": 0, "size": 1} if is_web(address) else {}
    with files.open(path, "rb", **streamed) as file:
        text = file.read(MOST_CHECKSUM_BYTES)
    return parse_checksum(text.decode("ascii", "replace"), checksum)


def part_path(target: Path) -> Path:
    """Return where a download grows: a hidden file next to its target."""
    return target.with_name(f".{target.name.removeprefix('.')}.part")


def record_path(target: Path) -> Path:
    """Return where it is recorded which version of a file is being or was downloaded."""
    return part_path(target).with_suffix(".part.json")


def download(source: str, target: Path, *, sha256: str | None = None) -> str:
    """Copy a file from a path or any URL that fsspec opens; return its sha256 in hex.

    A half file is continued only where the source is still the version that it was begun from, and
    a whole one taken as it is; `discard` removes the record of that. The target gets its name when
    size and checksum hold: that of `SOURCE.sha256`, where the source has one, and `sha256`.

    Raises:
        FileNotFoundError: If the source does not exist.
        ArchiveMismatch: If the copy's checksum differs; the copy is removed.
        OSError: If the disk is too small or the connection breaks.
    """
    warn_of_plain_http(source)
    version = file_version(source)
    part, record = part_path(target), record_path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    is_told = len(version) > len(("source", "size"))  # else another of the same size looks alike
    is_same = is_told and record.is_file() and read_json(record) == version
    have = sum(file.stat().st_size for file in (target, part) if is_same and file.is_file())
    require_space(target.parent, int(version["size"]) - have, f"copying {source}")
    if not is_same:
        target.unlink(missing_ok=True)
        part.unlink(missing_ok=True)
        sweep_half_made(record)
        write_json(record, version)
    if not target.is_file():
        copy_rest(source, part, version)
    copy = target if target.is_file() else part
    digest = sha256_of_file(copy)
    for expected, where in ((version.get("sha256"), "its store"), (sha256, "the registry")):
        if expected not in (None, digest):
            copy.unlink()
            record.unlink()
            raise ArchiveMismatch(
                f"{source} has sha256 {digest}, {where} says {expected}; fetch it again, or put "
                "the right file there"
            )
    copy.replace(target)
    return digest


def file_version(source: str) -> dict[str, str]:
    """Return what tells one version of a file from another: size, times, tags, checksum."""
    info = file_info(source)
    if info is None:
        raise FileNotFoundError(f"{source} does not exist; check its name")
    if info["size"] is None:
        raise ValueError(f"{source}: the server does not tell the size; fetch it by other means")
    version = {key: str(info[key]) for key in VERSION_FIELDS if info.get(key) is not None}
    stated = stated_sha256(source)
    return {"source": source, **version, **({"sha256": stated} if stated else {})}


def copy_rest(source: str, part: Path, version: dict[str, str]) -> None:
    """Append to a part what it lacks; a broken connection is taken up again where it broke.

    Raises:
        OSError: If nothing more comes, or what comes is of another version.
    """
    tries, num_bytes = 0, int(version["size"])
    with (
        part.open("ab") as writer,
        tqdm(total=num_bytes, unit="B", unit_scale=True, desc="copy") as progress,
    ):
        progress.update(writer.tell())
        while (have := writer.tell()) < num_bytes:
            try:
                for data in read_from(source, have, version):
                    writer.write(data[: num_bytes - writer.tell()])
                    progress.update(len(data))
                why = "the connection closed early"
            except ConnectionError as error:
                why = str(error)
            tries = 0 if writer.tell() > have else tries + 1
            if tries == TRIES:
                raise OSError(f"{source}: {why}; run the same command again to continue")
            time.sleep(WAIT_SECONDS * tries)
    flush_to_disk(part)


def read_from(source: str, offset: int, version: dict[str, str]) -> Iterator[bytes]:
    """Yield a file's bytes from an offset on."""
    try:
        with reaching(source):
            file, skip = open_at(source, offset, version)
            with file:
                while data := file.read(CHUNK_BYTES):
                    yield data[skip:]
                    skip = max(skip - len(data), 0)
    except ConnectionError:
        raise
    except OSError as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


def open_at(source: str, offset: int, version: dict[str, str]) -> tuple[Any, int]:
    """Return a file opened at an offset, and how many bytes of it must be skipped first.

    Raises:
        ArchiveMismatch: If a server answers with another version of it than is being copied.
    """
    files, path = open_files(source)
    if not is_web(source):
        file = files.open(path, "rb")
        file.seek(offset)
        return file, 0
    # One streamed answer is as fast as the connection, and servers without ranges give it as well:
    # they send all of the file again, which is skipped.
    headers = {"Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        etag = version.get("ETag", "")
        if etag and not etag.startswith("W/"):  # weak ones do not name bytes
            headers["If-Range"] = etag  # of another version, all of it comes
    file = files.open(path, "rb", block_size=0, size=1, headers=headers)
    require_version(source, file.r.status, file.r.headers, offset, version)
    return file, 0 if file.r.status == HTTPStatus.PARTIAL_CONTENT else offset


def require_version(
    source: str, status: int, headers: Mapping[str, str], offset: int, version: dict[str, str]
) -> None:
    """Refuse a server's answer that is not of the version, or the part of it, that was asked for.

    Raises:
        ArchiveMismatch: Says what differs.
    """
    size = int(version["size"])
    told = {"ETag": (headers.get("ETag"), version.get("ETag"))}
    if status == HTTPStatus.PARTIAL_CONTENT:
        found = CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
        start, total = (found[1], found[3]) if found else (None, None)
        told["start of its Content-Range"] = (start, str(offset))
        told["size"] = (size if total == "*" else total and int(total), size)
    elif "Content-Length" in headers and "Content-Encoding" not in headers:
        told["size"] = (int(headers["Content-Length"]), size)
    for name, (found, expected) in told.items():
        if found != expected and not (name == "ETag" and None in (found, expected)):
            raise ArchiveMismatch(
                f"{source} has changed while it was copied, or its server answers wrongly: {name} "
                f"is {found}, not {expected}; run the same command again"
            )


def warn_of_plain_http(source: str) -> None:
    """Say that what comes by http can be changed by whoever is in between."""
    host = source.partition("://")[2]
    if source.startswith("http://") and not host.startswith(LOOPBACK):
        LOGGER.warning(f"{source} comes by http, which anybody on the way can change; use https")


def discard(target: Path) -> None:
    """Remove a download and its record."""
    target.unlink(missing_ok=True)
    record_path(target).unlink(missing_ok=True)
