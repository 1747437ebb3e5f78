import gzip
import io
import os
import tarfile
from pathlib import Path

import lz4.frame
import pytest

from qat.storage import archive
from qat.storage.archive import (
    ArchiveMismatch,
    archive_stem,
    copy_archive,
    extract_archive,
    pack_folder,
    sidecar,
    unpacked_bytes,
)

SUFFIXES = (".tar.lz4", ".tgz")


@pytest.fixture
def folder(tmp_path):
    """A folder with a folder, an empty one, and content that does and does not pack."""
    made = tmp_path / "things"
    (made / "inner" / "empty").mkdir(parents=True)
    (made / "a.bin").write_bytes(os.urandom(200_000))
    (made / "inner" / "b.txt").write_text("text " * 10_000)
    (made / "none").write_bytes(b"")
    return made


def content(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def write_tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    """Write an archive of given members, safe or not."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    pack = lz4.frame.compress if path.name.endswith(".lz4") else gzip.compress
    path.write_bytes(pack(raw.getvalue()))
    return path


def entry(name: str, **fields) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, b"" if fields else b"data"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_packed_comes_out(folder, tmp_path, suffix):
    """Same files, same bytes, under the folder's own name; the checksum is the file's."""
    packed = tmp_path / f"x{suffix}"
    digest = pack_folder(folder, packed)
    assert sidecar(packed).read_text() == f"{digest}  {packed.name}\n"
    extracted = extract_archive(packed, tmp_path / "out")
    assert extracted == tmp_path / "out" / "things"
    assert content(extracted) == content(folder)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["things"]
    assert unpacked_bytes(packed) >= 250_000


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_folder_gives_the_same_archive(folder, tmp_path, suffix):
    """Neither time nor owner is written."""
    first = pack_folder(folder, tmp_path / f"x{suffix}")
    os.utime(folder / "a.bin", (0, 0))
    assert pack_folder(folder, tmp_path / f"y{suffix}") == first


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "bad",
    [
        entry("/etc/thing"),
        entry("../thing"),
        entry("a/../../thing"),
        entry("..\\thing"),
        entry("C:/thing"),
        entry("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        entry("link", type=tarfile.LNKTYPE, linkname="good"),
        entry("device", type=tarfile.CHRTYPE),
        entry("pipe", type=tarfile.FIFOTYPE),
    ],
    ids=lambda bad: f"{bad[0].name}:{bad[0].type.decode()}",
)
def test_members_that_could_reach_elsewhere_are_refused(tmp_path, suffix, bad):
    """The archive is refused as a whole: nothing of it stays, inside or outside."""
    packed = write_tar(tmp_path / f"x{suffix}", [entry("good"), bad, entry("last")])
    with pytest.raises(ArchiveMismatch, match="refused"):
        extract_archive(packed, tmp_path / "into" / "out")
    assert list((tmp_path / "into").rglob("*")) == [tmp_path / "into" / "out"]
    assert not (tmp_path / "thing").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("how", ["cut", "bit", "other"])
def test_a_broken_archive_leaves_nothing(folder, tmp_path, suffix, how):
    """Cut short, altered, or no archive at all: known also without a checksum beside it."""
    packed = tmp_path / f"x{suffix}"
    pack_folder(folder, packed)
    sidecar(packed).unlink()
    data = bytearray(packed.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "bit":
        data[len(data) // 2] ^= 1
    else:
        data = b"not an archive" * 100
    packed.write_bytes(data)
    with pytest.raises(ArchiveMismatch, match="cut or altered"):
        extract_archive(packed, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_wrong_checksum_is_refused_before_anything_has_its_name(folder, tmp_path):
    """The checksum beside the archive speaks for its bytes."""
    packed = tmp_path / "x.tgz"
    pack_folder(folder, packed)
    sidecar(packed).write_text("0" * 64 + "  x.tgz\n")
    with pytest.raises(ArchiveMismatch, match="sha256"):
        extract_archive(packed, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    sidecar(packed).write_text("not a checksum\n")
    with pytest.raises(ArchiveMismatch, match="holds no sha256"):
        extract_archive(packed, tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "made"),
    [
        (["a/x", "a/y"], {"a": {"x", "y"}}),
        (["a/a/x"], {"a": {"x"}}),
        (["a/b/x"], {"a": {"b", "b/x"}}),
        (["x", "y"], {"pack": {"x", "y"}}),
        (["./x", "._x"], {"pack": {"x"}}),
        (["a/x", "a/._x", "._a"], {"a": {"x"}}),
    ],
)
def test_archives_of_any_habit_give_one_folder(tmp_path, names, made):
    """With and without a top folder, one nested in its like, with a Mac's notes."""
    packed = write_tar(tmp_path / "pack.tgz", [entry(name) for name in names])
    extract_archive(packed, tmp_path / "out")
    found = {path.name: set(content(path)) for path in (tmp_path / "out").iterdir()}
    assert found == made


def test_what_is_there_is_not_written_over(folder, tmp_path):
    """The remedy is told; what a kill left of an extraction is swept away."""
    packed = tmp_path / "x.tgz"
    pack_folder(folder, packed)
    left = tmp_path / "out" / ".x.tgz.extracting"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    extracted = extract_archive(packed, tmp_path / "out", name="mine")
    assert content(extracted) == content(folder)
    with pytest.raises(FileExistsError, match="exists"):
        extract_archive(packed, tmp_path / "out", name="mine")


def test_a_copy_goes_on_where_it_was_cut(tmp_path, monkeypatch):
    """The bytes that are there are not read again, and the name comes last."""
    source = tmp_path / "x.tgz"
    source.write_bytes(os.urandom(300_000))
    target = tmp_path / "out" / "x.tgz"
    part = tmp_path / "out" / ".x.tgz.part"
    part.parent.mkdir()
    part.write_bytes(source.read_bytes()[:123_456])
    monkeypatch.setattr(archive, "CHUNK_BYTES", 1000)
    read = []
    monkeypatch.setattr(archive, "tqdm", counting_tqdm(read))
    assert copy_archive(source.as_uri(), target) == target
    assert target.read_bytes() == source.read_bytes()
    assert sum(read) == 300_000 - 123_456
    assert not part.exists()


def counting_tqdm(read: list[int]):
    """A progress bar that keeps what it is told."""

    class Bar:
        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def update(self, count):
            read.append(count)

    return Bar


def test_a_copy_is_checked_against_the_checksum_beside_its_source(tmp_path):
    """A part of another file is found out, removed, and copied afresh by the next call."""
    source = tmp_path / "x.tgz"
    source.write_bytes(os.urandom(3000))
    pack_digest = archive.sha256_of_file(source)
    sidecar(source).write_text(f"{pack_digest}  x.tgz\n")
    target = tmp_path / "out" / "x.tgz"
    part = tmp_path / "out" / ".x.tgz.part"
    part.parent.mkdir()
    part.write_bytes(b"0" * 1000)
    with pytest.raises(ArchiveMismatch, match="sha256"):
        copy_archive(str(source), target)
    assert not part.exists()
    assert not target.exists()
    copy_archive(str(source), target)
    assert target.read_bytes() == source.read_bytes()


def test_the_disk_is_asked_first(folder, tmp_path, monkeypatch):
    """Nothing is started that cannot be held."""
    packed = tmp_path / "x.tar.lz4"
    pack_folder(folder, packed)
    usage = archive.shutil.disk_usage(tmp_path)._replace(free=archive.FREE_MARGIN_BYTES + 240_000)
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="free some space"):
        extract_archive(packed, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_be_packed_is_told(folder, tmp_path):
    """No folder, a link in it, an archive inside it, a suffix that is none."""
    with pytest.raises(FileNotFoundError, match="does not exist"):
        pack_folder(tmp_path / "none", tmp_path / "x.tgz")
    with pytest.raises(ValueError, match="in the folder that it packs"):
        pack_folder(folder, folder / "x.tgz")
    with pytest.raises(ValueError, match="does not end in"):
        pack_folder(folder, tmp_path / "x.zip")
    (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="link"):
        pack_folder(folder, tmp_path / "x.tgz")
    assert archive_stem("a.b.tar.lz4") == "a.b"
