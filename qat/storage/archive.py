"""Archives of a folder, `.tar.lz4` and `.tgz`: pack, check, extract safely.

Everything is streamed: no archive is ever held in memory. A file or folder gets its final name
only when it is whole. Next to an archive lies `NAME.sha256`, in the form that `sha256sum -c` reads.
"""

import gzip
import hashlib
import io
import shutil
import tarfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

import lz4.frame
from tqdm import tqdm

from qat.storage.files import (
    FREE_MARGIN_BYTES,
    atomic_file,
    folder_lock,
    is_leftover,
    replace_folder,
    require_space,
    sha256_of_file,
    sweep_half_made,
    write_text,
)
from qat.storage.receipt import read_receipt, receipt_path, stamp, write_receipt

SUFFIXES = (".tar.lz4", ".tgz", ".tar.gz")
CHUNK_BYTES = 1 << 20
GZIP_LEVEL = 6
EXTRACTING_SECONDS = 3600  # that a process waits for another one, such as of torchrun
MOST_CHECKSUM_BYTES = 4096  # of a file that holds one line
MOST_MEMBERS = 1_000_000  # a cache of 16 G tokens has as many shards
MOST_HEADER_BYTES = 1 << 20  # tarfile reads each into memory
LONG_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
DAMAGED = (tarfile.TarError, EOFError, gzip.BadGzipFile, RuntimeError, zlib.error)
LZ4_MAGIC = b"\x04\x22\x4d\x18"


class ArchiveMismatch(ValueError):  # noqa: N818 named like CacheMismatch
    """An archive that is cut, altered, or would write outside its folder."""


def archive_stem(name: str) -> str:
    """Return an archive's name without its suffix."""
    for suffix in SUFFIXES:
        if name.endswith(suffix) and len(name) > len(suffix):
            return name.removesuffix(suffix)
    raise ValueError(f"{name} does not end in {', '.join(SUFFIXES)}; give an archive")


def sidecar(archive: Path) -> Path:
    """Return the path of an archive's checksum file."""
    return archive.with_name(archive.name + ".sha256")


def parse_checksum(text: str, where: str) -> str:
    """Return the sha256 in the text of a checksum file."""
    digest = text.split()[0].lower() if text.strip() else ""
    if len(digest) != hashlib.sha256().digest_size * 2:
        raise ArchiveMismatch(f"{where} holds no sha256; remove it or make it again")
    return digest


def pack_folder(
    folder: Path,
    archive: Path,
    *,
    leave_out: Collection[str] = (),
    instead: Mapping[Path, bytes] | None = None,
) -> str:
    """Write a folder as one archive, its sha256 in a file next to it, and return the sha256.

    The same content gives the same archive: members by name, no owners, no times. `leave_out` are
    names directly in the folder that stay behind, as does what killed processes left half made.
    Files in `instead` go with that content.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist; give one to pack")
    archive_stem(archive.name)
    if archive.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{archive} would lie in the folder that it packs; choose another place")
    items = [item for item in sorted(folder.iterdir()) if item.name not in leave_out]
    paths = [path for item in items for path in (item, *sorted(item.rglob("*")))]
    paths = [path for path in paths if not is_left_behind(path, folder)]
    for path in paths:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is a link or a device; replace it by a file to pack it")
    num_bytes = sum(path.stat().st_size for path in paths if path.is_file())
    archive.parent.mkdir(parents=True, exist_ok=True)
    sweep_half_made(archive)
    sweep_half_made(sidecar(archive))
    require_space(archive.parent, num_bytes // 4, f"packing {folder}")
    top = folder.resolve().name
    with atomic_file(archive) as temporary:
        with (
            open_packed(temporary, archive.name) as stream,
            tqdm.wrapattr(stream, "write", total=num_bytes, desc=archive.name) as counted,
            tarfile.open(fileobj=counted, mode="w|", format=tarfile.PAX_FORMAT) as tar,
        ):
            tar.add(folder, top, recursive=False, filter=anonymous)
            for path in paths:
                name = f"{top}/{path.relative_to(folder).as_posix()}"
                if (content := (instead or {}).get(path)) is not None:
                    member = anonymous(tarfile.TarInfo(name))
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                else:
                    tar.add(path, name, recursive=False, filter=anonymous)
        digest = sha256_of_file(temporary)
    write_text(sidecar(archive), f"{digest}  {archive.name}\n")
    return digest


def is_left_behind(path: Path, folder: Path) -> bool:
    """Return whether a path, or a folder around it, is what a killed process left half made."""
    return any(is_leftover(Path(part)) for part in path.relative_to(folder).parts)


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return a member without owner and time."""
    mode = 0o755 if member.isdir() else 0o644
    return member.replace(mtime=0, mode=mode, uid=0, gid=0, uname="", gname="", deep=False)


@contextmanager
def open_packed(path: Path, name: str) -> Iterator[IO[bytes]]:
    """Open a packed file for writing; its content is checksummed by its own format."""
    if name.endswith(".lz4"):
        with lz4.frame.open(path, "wb", content_checksum=True) as stream:
            yield stream
    else:
        # Without a time and a name in its header, the same tar gives the same file.
        with path.open("wb") as file, gzip.GzipFile("", "wb", GZIP_LEVEL, file, mtime=0) as stream:
            yield stream


def extract_once(archive: Path) -> Path:
    """Return the folder next to an archive with its content, extracted where it is not yet."""
    folder = archive.parent / archive_stem(archive.name)
    receipt = read_receipt(folder)
    if receipt and receipt.source_stamp == stamp(archive):
        return folder
    with folder_lock(folder, patience_seconds=EXTRACTING_SECONDS):
        return extract_next_to(archive, folder)


def extract_next_to(archive: Path, folder: Path) -> Path:
    """Return the folder with an archive's content, made anew where it is of another one."""
    receipt = read_receipt(folder)
    if receipt and receipt.source_stamp == stamp(archive):
        return folder  # another process has just made it
    if folder.exists() and receipt is None:
        raise FileExistsError(
            f"{folder} was not extracted from {archive.name}, or was changed since; "
            "name the folder itself, or remove it to extract the archive"
        )
    digest = check_sidecar(archive)
    if not (receipt and receipt.sha256 == digest):
        temporary = archive.with_name(f".{folder.name}.extracting")
        made = extract_archive(archive, temporary)
        receipt_path(folder).unlink(missing_ok=True)
        replace_folder(made, folder)
        shutil.rmtree(temporary, ignore_errors=True)
    write_receipt(folder, str(archive), digest, source_stamp=stamp(archive))
    return folder


def check_sidecar(archive: Path) -> str:
    """Return an archive's sha256 in hex, checked against the file next to it where there is one."""
    digest, path = sha256_of_file(archive), sidecar(archive)
    if path.is_file():
        with path.open("rb") as file:
            text = file.read(MOST_CHECKSUM_BYTES).decode("ascii", "replace")
        expected = parse_checksum(text, str(path))
        if digest != expected:
            raise ArchiveMismatch(
                f"{archive} has sha256 {digest}, {path.name} says {expected}; fetch it again"
            )
    return digest


def extract_archive(archive: Path, folder: Path) -> Path:
    """Extract an archive into a new folder, which stays only where all of it is right.

    What a killed call left there is removed. What is returned is the folder inside that holds the
    content: without one top folder around it, and taken out of one of the same name.

    Raises:
        ArchiveMismatch: If the archive is cut, altered, or has a member that would be written
            outside the folder, or is a link to there or a device.
        OSError: If the disk is too small.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    require_space(folder.parent, archive.stat().st_size, f"extracting {archive}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        extract_members(archive, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return top_folder(folder)


def extract_members(archive: Path, folder: Path) -> None:
    """Write an archive's members into a folder."""
    members = SafeMembers(shutil.disk_usage(folder).free - FREE_MARGIN_BYTES)
    try:
        with open_unpacked(archive) as stream:
            with tarfile.open(fileobj=stream, mode="r|", tarinfo=BoundedMember) as tar:
                tar.extractall(folder, filter=members)
            while stream.read(CHUNK_BYTES):  # to the end, where the content's checksum is
                pass
    except tarfile.FilterError as error:
        raise ArchiveMismatch(f"{archive}: {error}; refused") from error
    except ArchiveMismatch as error:
        raise ArchiveMismatch(f"{archive}: {error}; refused") from error
    except (*DAMAGED, ValueError) as error:
        raise ArchiveMismatch(f"{archive} is cut or altered ({error}); fetch it again") from error


@contextmanager
def open_unpacked(archive: Path) -> Iterator[IO[bytes]]:
    """Open a packed file for reading; its first bytes tell the format."""
    # lz4 asks for 8 KB at a time, which a mounted drive answers slowly.
    with (
        archive.open("rb", buffering=CHUNK_BYTES) as file,
        tqdm.wrapattr(file, "read", total=archive.stat().st_size, desc="extract") as counted,
    ):
        is_lz4 = file.peek(len(LZ4_MAGIC))[: len(LZ4_MAGIC)] == LZ4_MAGIC
        with lz4.frame.open(counted, "rb") if is_lz4 else gzip.GzipFile(fileobj=counted) as stream:
            yield stream


class BoundedMember(tarfile.TarInfo):
    """A member whose headers are read only where they are as short as names and times are."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in LONG_HEADERS and self.size > MOST_HEADER_BYTES:
            raise ArchiveMismatch(f"a header of {self.size:,} bytes is no member's")
        return super()._proc_member(archive)


class SafeMembers:
    """What to write of each member: nothing outside the folder, nothing beyond the disk."""

    def __init__(self, most_bytes: int) -> None:
        """Bound what all members together may take."""
        self.most_bytes = most_bytes
        self.count = self.num_bytes = 0

    def __call__(self, member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
        """Return a member as it is written, None for one that is left out."""
        self.count += 1
        self.num_bytes += member.size
        if self.count > MOST_MEMBERS:
            raise ArchiveMismatch(f"it has more than {MOST_MEMBERS:,} members")
        if self.num_bytes > self.most_bytes:
            raise OSError(
                f"extracting {member.name} needs {self.num_bytes:,} bytes so far and {folder} had "
                f"{self.most_bytes:,} free; free some space"
            )
        if PurePosixPath(member.name).name.startswith("._"):
            return None  # AppleDouble: macOS's attributes of a file
        # Without a time, files are as old as their extraction, not as the archive says.
        return tarfile.data_filter(member, folder).replace(mtime=None, deep=False)


def top_folder(folder: Path) -> Path:
    """Return the one folder that holds an archive's content, `folder` itself where none does."""
    top = folder
    # The outer folder may be left; inside it only one of the same name is a slip.
    while len(items := list(top.iterdir())) == 1 and items[0].is_dir():
        if top != folder and items[0].name != top.name:
            break
        top = items[0]
    return top
