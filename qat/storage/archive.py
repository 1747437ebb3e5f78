"""Archives of a folder, `.tar.lz4` and `.tgz`: pack, fetch, check, extract safely.

Everything is streamed: no archive is ever held in memory or unpacked twice. A file or folder
gets its final name only when it is whole. Beside an archive lies `NAME.sha256`, in the form that
`sha256sum -c` reads.
"""

import gzip
import hashlib
import io
import shutil
import tarfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tqdm import tqdm

from qat.storage.files import atomic_file, flush_to_disk, sha256_of_file, write_text
from qat.storage.web import WebFiles

SUFFIXES = (".tar.lz4", ".tgz", ".tar.gz")
CHUNK_BYTES = 1 << 20
FREE_MARGIN_BYTES = 64 << 20  # left free, so that a full disk does not take the system along
GZIP_LEVEL = 6
GZIP_SIZE_BYTES = 4  # at the end of a gzip file, the unpacked size
LZ4_HEADER_BYTES = 19  # the longest frame header


class ArchiveMismatch(ValueError):  # noqa: N818 named like CacheMismatch
    """An archive that is cut, altered, or would write outside its folder."""


class CountingReader(io.RawIOBase):
    """A file read once from the start: hashed and counted on the way."""

    def __init__(self, file: IO[bytes], progress: tqdm) -> None:
        """Wrap an open binary file."""
        self._file, self._progress = file, progress
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        """Whether it can be read: always."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        data = self._file.read(size)
        self._digest.update(data)
        self._progress.update(len(data))
        return data

    def finish(self) -> str:
        """Read what is left; return the sha256 of the whole file in hex."""
        while self.read(CHUNK_BYTES):
            pass
        return self._digest.hexdigest()


def archive_stem(name: str) -> str:
    """Return an archive's name without its suffix.

    Raises:
        ValueError: If it has none of the known suffixes.
    """
    for suffix in SUFFIXES:
        if name.endswith(suffix) and len(name) > len(suffix):
            return name.removesuffix(suffix)
    raise ValueError(f"{name} does not end in {', '.join(SUFFIXES)}; give an archive")


def sidecar(archive: Path) -> Path:
    """Return the path of an archive's checksum file."""
    return archive.with_name(archive.name + ".sha256")


def pack_folder(folder: Path, archive: Path, *, leave_out: Collection[str] = ()) -> str:
    """Write a folder as one archive, and its checksum beside it.

    The same content gives the same tar: members by name, no owners, no times.

    Args:
        folder: Becomes the archive's one top folder.
        archive: Ends in .tar.lz4, .tgz or .tar.gz; written over.
        leave_out: Names directly in the folder that stay behind.

    Returns:
        The archive's sha256 in hex.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it holds links, or the archive would lie inside it.
        OSError: If the disk is too small even for well-packed content.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist; give one to pack")
    archive_stem(archive.name)
    if archive.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{archive} would lie in the folder that it packs; choose another place")
    inside = sorted(folder.rglob("*"))
    paths = [folder, *(p for p in inside if p.relative_to(folder).parts[0] not in leave_out)]
    for path in paths:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is a link or a device; replace it by a file to pack it")
    members = {path: member_of(path, folder) for path in paths}
    num_bytes = tar_bytes(list(members.values()))
    archive.parent.mkdir(parents=True, exist_ok=True)
    require_space(archive.parent, num_bytes // 4, f"packing {folder}")
    with (
        atomic_file(archive) as temporary,
        tqdm(total=num_bytes, unit="B", unit_scale=True, desc=archive.name) as progress,
    ):
        with (
            open_packed(temporary, archive.name, num_bytes) as stream,
            tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar,
        ):
            for path, member in members.items():
                add_member(tar, path, member)
                progress.update(member.size)
        digest = sha256_of_file(temporary)
    write_text(sidecar(archive), f"{digest}  {archive.name}\n")
    return digest


def member_of(path: Path, folder: Path) -> tarfile.TarInfo:
    """Return a file's or folder's entry, without owner and time."""
    top = folder.resolve().name
    member = tarfile.TarInfo(str(PurePosixPath(top, *path.relative_to(folder).parts)))
    if path.is_dir():
        member.type, member.mode = tarfile.DIRTYPE, 0o755
    else:
        member.size, member.mode = path.stat().st_size, 0o644
    return member


def add_member(tar: tarfile.TarFile, path: Path, member: tarfile.TarInfo) -> None:
    """Add a file or folder as its entry says."""
    if member.isdir():
        tar.addfile(member)
        return
    with path.open("rb") as file:
        tar.addfile(member, file)


def tar_bytes(members: list[tarfile.TarInfo]) -> int:
    """Return the bytes of a tar of the members, so that a frame can state them."""
    headers = sum(len(member.tobuf(tarfile.PAX_FORMAT)) for member in members)
    blocks = sum(-(-member.size // tarfile.BLOCKSIZE) for member in members) + 2  # two end it
    return -(-(headers + blocks * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


@contextmanager
def open_packed(path: Path, name: str, num_bytes: int) -> Iterator[IO[bytes]]:
    """Open a packed file for writing; its frame is checksummed by its own format."""
    if name.endswith(".lz4"):
        import lz4.frame

        with lz4.frame.open(path, "wb", content_checksum=True, source_size=num_bytes) as stream:
            yield stream
    else:
        # Without a time and a name in its header, the same tar gives the same file.
        with (
            path.open("wb") as file,
            gzip.GzipFile("", "wb", GZIP_LEVEL, file, mtime=0) as stream,
        ):
            yield stream


def copy_archive(source: str, target: Path) -> Path:
    """Copy an archive from a path or URL, going on where an earlier call was cut short.

    What is there already lies in `.NAME.part`; it gets its name when size and checksum hold. The
    checksum is that of `SOURCE.sha256`, where the source has one.

    Args:
        source: A path, or any URL that fsspec opens (https://, gs://, s3://).
        target: The file to make; skipped when it is there and right.

    Returns:
        The target.

    Raises:
        FileNotFoundError: If the source does not exist.
        ArchiveMismatch: If the copy's checksum differs; the copy is removed.
        OSError: If the disk is too small.
    """
    files, source_path = open_files(source)
    if not files.exists(source_path):
        raise FileNotFoundError(f"{source} does not exist; check its name")
    num_bytes, wanted = files.size(source_path), stated_sha256(files, source_path)
    if target.is_file() and (wanted is None or sha256_of_file(target) == wanted):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    have = part.stat().st_size if part.is_file() else 0
    if have > num_bytes:
        part.unlink()
        have = 0
    require_space(target.parent, num_bytes - have, f"copying {source}")
    with (
        files.open(source_path, "rb") as reader,
        part.open("ab") as writer,
        tqdm(total=num_bytes, initial=have, unit="B", unit_scale=True, desc="copy") as progress,
    ):
        reader.seek(have)
        while data := reader.read(CHUNK_BYTES):
            writer.write(data)
            progress.update(len(data))
    flush_to_disk(part)
    if part.stat().st_size != num_bytes:
        raise OSError(f"{source} ended early; run the same command again and it goes on from there")
    if wanted is not None:
        require_sha256(part, sha256_of_file(part), wanted)
        write_text(sidecar(target), f"{wanted}  {target.name}\n")
    part.replace(target)
    return target


def open_files(source: str) -> tuple[Any, str]:
    """Return the file system of a path or URL, and its path there.

    Raises:
        ValueError: If no installed package opens such URLs; names the one that would.
    """
    if source.startswith(("http://", "https://")):
        return WebFiles(), source
    import fsspec

    try:
        return fsspec.core.url_to_fs(source)
    except ImportError as error:
        raise ValueError(f"{source} needs another package: {error}") from error


def stated_sha256(files: Any, path: str) -> str | None:
    """Return the checksum beside a file, None where there is none."""
    beside = path + ".sha256"
    if not files.exists(beside):
        return None
    words = files.cat_file(beside).decode("ascii", "replace").split()
    if not words or len(words[0]) != hashlib.sha256().digest_size * 2:
        raise ArchiveMismatch(f"{beside} holds no sha256; remove it or make it again")
    return words[0].lower()


def require_sha256(part: Path, found: str, wanted: str) -> None:
    """Refuse and remove a copy whose checksum differs."""
    if found != wanted:
        part.unlink()
        raise ArchiveMismatch(f"{part} had sha256 {found}, stated is {wanted}; fetch it again")


def extract_archive(archive: Path, into: Path, *, name: str | None = None) -> Path:
    """Extract an archive into a folder of its own; whole, or not at all.

    The archive is read once: its checksum (that of the file beside it, where there is one) is
    known at the end, before anything gets its final name. A folder nested in one of the same
    name is taken out of it.

    Args:
        archive: Ends in .tar.lz4, .tgz or .tar.gz.
        into: Where the folder goes.
        name: Of the folder; the archive's one top folder, or else its stem, when not given.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If the archive does not exist.
        FileExistsError: If the folder is there already.
        ArchiveMismatch: If the archive is cut, altered, or has a member that is absolute, climbs
            out, or is a link or device.
        OSError: If the disk is too small.
    """
    if not archive.is_file():
        raise FileNotFoundError(f"archive {archive} does not exist; check its name")
    stem = archive_stem(archive.name)
    wanted = stated_sha256(*open_files(str(archive)))
    into.mkdir(parents=True, exist_ok=True)
    require_space(into, unpacked_bytes(archive), f"extracting {archive}")
    temporary = into / f".{archive.name}.extracting"
    shutil.rmtree(temporary, ignore_errors=True)  # what a kill left
    temporary.mkdir()
    try:
        found = extract_stream(archive, temporary)
        if wanted is not None and found != wanted:
            raise ArchiveMismatch(
                f"{archive} has sha256 {found}, {sidecar(archive).name} says {wanted}; "
                "fetch it again"
            )
        top = top_folder(temporary)
        folder = into / (name or (stem if top == temporary else top.name))
        if folder.exists():
            raise FileExistsError(f"{folder} exists; remove it or choose another --output-dir")
        top.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def unpacked_bytes(archive: Path) -> int:
    """Return how many bytes an archive unpacks to: what it states, at least its own size."""
    packed = archive.stat().st_size
    with archive.open("rb") as file:
        if archive.name.endswith(".lz4"):
            import lz4.frame

            try:
                stated = lz4.frame.get_frame_info(file.read(LZ4_HEADER_BYTES))["content_size"]
            except RuntimeError:
                stated = 0  # no lz4 file: extracting says so
        elif packed > GZIP_SIZE_BYTES:
            file.seek(-GZIP_SIZE_BYTES, io.SEEK_END)
            stated = int.from_bytes(file.read(), "little")  # modulo 4 GiB
        else:
            stated = 0
    return max(packed, stated)


def extract_stream(archive: Path, folder: Path) -> str:
    """Extract an archive's members into a folder; return the archive's sha256 in hex."""
    with (
        # lz4 asks for 8 KB at a time, which a mounted drive answers slowly.
        archive.open("rb", buffering=CHUNK_BYTES) as file,
        tqdm(total=archive.stat().st_size, unit="B", unit_scale=True, desc="extract") as progress,
    ):
        reader = CountingReader(file, progress)
        try:
            with open_unpacked(reader, archive.name) as stream:
                with tarfile.open(fileobj=stream, mode="r|") as tar:
                    for member in tar:
                        extract_member(tar, member, archive, folder)
                while stream.read(CHUNK_BYTES):  # to the end, where the frame's checksum is
                    pass
        except (tarfile.TarError, EOFError, gzip.BadGzipFile, RuntimeError, zlib.error) as error:
            raise ArchiveMismatch(
                f"{archive} is cut or altered ({error}); fetch it again"
            ) from error
        return reader.finish()


@contextmanager
def open_unpacked(reader: CountingReader, name: str) -> Iterator[IO[bytes]]:
    """Open a packed stream for reading."""
    if name.endswith(".lz4"):
        import lz4.frame

        with lz4.frame.open(reader, "rb") as stream:
            yield stream
    else:
        with gzip.GzipFile(fileobj=reader, mode="rb") as stream:
            yield stream


def extract_member(
    tar: tarfile.TarFile, member: tarfile.TarInfo, archive: Path, folder: Path
) -> None:
    """Write one member below a folder, after refusing what could reach elsewhere."""
    parts = PurePosixPath(member.name.replace("\\", "/")).parts
    if not (member.isfile() or member.isdir()):
        raise ArchiveMismatch(f"{archive}: member {member.name!r} is a link or device; refused")
    if not parts or parts[0] == "/" or ".." in parts or ":" in parts[0]:
        if member.isdir() and not parts:
            return  # "." itself
        raise ArchiveMismatch(f"{archive}: member {member.name!r} reaches outside; refused")
    if parts[-1].startswith("._"):
        return  # a Mac's notes on a file
    target = folder.joinpath(*parts)
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    require_space(folder, member.size, f"extracting {member.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    source = tar.extractfile(member)
    with target.open("wb") as file:
        shutil.copyfileobj(source, file, CHUNK_BYTES)


def top_folder(folder: Path) -> Path:
    """Return the one folder that holds an archive's content, `folder` itself where none does."""
    top = folder
    while True:
        items = list(top.iterdir())
        is_nested = len(items) == 1 and items[0].is_dir()
        # The outer folder may be left; inside it only one of the same name is a slip.
        if not is_nested or (top != folder and items[0].name != top.name):
            return top
        top = items[0]


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        OSError: With the free and the needed bytes.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes + FREE_MARGIN_BYTES:
        raise OSError(
            f"{what} needs {num_bytes:,} bytes and {folder} has {free:,} free; free some space"
        )
