import gzip
import io
import os
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lz4.frame
import pytest

from qat.storage import archive, files
from qat.storage.archive import (
    ArchiveMismatch,
    archive_stem,
    extract_archive,
    extract_once,
    pack_folder,
    sidecar,
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
        entry("../thing"),
        entry("a/../../thing"),
        entry("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        entry("link", type=tarfile.SYMTYPE, linkname="../../thing"),
        entry("link", type=tarfile.LNKTYPE, linkname="../../thing"),
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
    assert list((tmp_path / "into").rglob("*")) == []
    assert not (tmp_path / "thing").exists()


@pytest.mark.parametrize("name", ["/etc/thing", "..\\thing", "C:/thing"])
def test_odd_names_stay_inside(tmp_path, name):
    """A member is written below the folder, whatever its name looks like on another system."""
    packed = write_tar(tmp_path / "x.tgz", [entry("good"), entry(name)])
    out = extract_archive(packed, tmp_path / "into" / "out")
    assert sum(path.is_file() for path in out.rglob("*")) == 2
    assert list((tmp_path / "into").iterdir()) == [tmp_path / "into" / "out"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("how", ["cut", "bit", "other"])
def test_a_broken_archive_leaves_nothing(folder, tmp_path, suffix, how):
    """Cut short, altered, or no archive at all: known also without a checksum next to it."""
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
    assert not (tmp_path / "out").exists()


def test_a_wrong_checksum_is_refused_before_anything_has_its_name(folder, tmp_path):
    """The checksum next to the archive speaks for its bytes."""
    packed = tmp_path / "x.tgz"
    pack_folder(folder, packed)
    sidecar(packed).write_text("0" * 64 + "  x.tgz\n")
    with pytest.raises(ArchiveMismatch, match="sha256"):
        extract_once(packed)
    sidecar(packed).write_text("not a checksum\n")
    with pytest.raises(ArchiveMismatch, match="holds no sha256"):
        extract_once(packed)
    assert not (tmp_path / "x").exists()


def test_the_first_bytes_tell_the_format(folder, tmp_path):
    """A copy under any name is extracted as what it is."""
    for suffix in SUFFIXES:
        pack_folder(folder, tmp_path / f"x{suffix}")
        (tmp_path / f"x{suffix}").rename(tmp_path / "copy")
        assert content(extract_archive(tmp_path / "copy", tmp_path / "out")) == content(folder)


@pytest.mark.parametrize(
    ("names", "made"),
    [
        (["a/x", "a/y"], {"x", "y"}),
        (["a/a/x"], {"x"}),
        (["a/b/x"], {"b", "b/x"}),
        (["x", "y"], {"x", "y"}),
        (["./x", "._x"], {"x"}),
        (["a/x", "a/._x", "._a"], {"x"}),
    ],
)
def test_archives_of_any_layout_give_one_folder(tmp_path, names, made):
    """With and without a top folder, one nested in its like, with AppleDouble files."""
    packed = write_tar(tmp_path / "pack.tgz", [entry(name) for name in names])
    assert set(content(extract_archive(packed, tmp_path / "out"))) == made


def test_an_archive_is_extracted_once(folder, tmp_path):
    """The second call leaves the folder alone, also where the archive only got another time."""
    packed = tmp_path / "x.tgz"
    pack_folder(folder, packed)
    left = tmp_path / ".x.extracting"
    left.mkdir()
    (left / "half").write_text("half")
    extracted = extract_once(packed)
    assert extracted == tmp_path / "x"
    assert content(extracted) == content(folder)
    assert not left.exists()
    inode = extracted.stat().st_ino
    os.utime(packed, (0, 0))
    assert extract_once(packed).stat().st_ino == inode


@pytest.mark.recipe
def test_processes_that_open_one_archive_wait_for_each_other(folder, tmp_path):
    """Such as those of torchrun: the first extracts, the others find what it made."""
    packed = tmp_path / "x.tgz"
    pack_folder(folder, packed)
    with ThreadPoolExecutor(2) as pool:
        with files.folder_lock(tmp_path / "x"):
            calls = [pool.submit(extract_once, packed) for _ in range(2)]
            time.sleep(2 * files.LOCK_SECONDS)
            assert not any(call.done() for call in calls)
            made = archive.extract_next_to(packed, tmp_path / "x").stat().st_ino
        assert {call.result().stat().st_ino for call in calls} == {made}


def test_a_changed_archive_is_extracted_again(folder, tmp_path):
    """A folder extracted before won over its changed archive, unchecked."""
    packed = tmp_path / "x.tgz"
    pack_folder(folder, packed)
    extract_once(packed)
    (folder / "a.bin").write_bytes(b"changed")
    pack_folder(folder, packed)
    assert content(extract_once(packed)) == content(folder)


@pytest.mark.parametrize("case", ["never extracted", "changed since", "changed, archive too"])
def test_a_folder_that_is_not_the_archives_is_not_replaced(folder, tmp_path, case):
    """Somebody's own folder, or own changes, are neither taken for the content nor lost."""
    packed = tmp_path / "x.tgz"
    pack_folder(folder, packed)
    if case == "never extracted":
        (tmp_path / "x").mkdir()
    else:
        extract_once(packed)
    (tmp_path / "x" / "none").write_text("mine")
    if case == "changed, archive too":
        (folder / "none").write_text("new")
        pack_folder(folder, packed)
    with pytest.raises(FileExistsError, match="name the folder itself"):
        extract_once(packed)
    assert (tmp_path / "x" / "none").read_text() == "mine"


@pytest.mark.parametrize("free", [100_000, 220_000])
def test_the_disk_is_asked_first(folder, tmp_path, monkeypatch, free):
    """No archive and no member is begun that cannot be held, and nothing of it stays."""
    (folder / "z.txt").write_text("z" * 300_000)  # packs well
    packed = tmp_path / "x.tar.lz4"
    pack_folder(folder, packed)
    usage = files.shutil.disk_usage(tmp_path)._replace(free=files.FREE_MARGIN_BYTES + free)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="free some space"):
        extract_archive(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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


def test_what_killed_processes_left_is_not_packed(folder, tmp_path):
    """A half shard of a build that was cut short went along into the archive."""
    expected = pack_folder(folder, tmp_path / "x.tgz")
    (folder / "inner" / ".b.txt.abc.part").write_text("half")
    (folder / ".a.bin.part").mkdir()
    (folder / ".a.bin.part" / "file").write_text("half")
    (folder / ".inner.lock").write_text("")
    assert pack_folder(folder, tmp_path / "y.tgz") == expected


@pytest.mark.parametrize("kind", ["pax", "long name"])
def test_a_header_that_would_fill_the_memory_is_refused(tmp_path, kind):
    """tarfile reads a header at once, however long its size says it is."""
    if kind == "pax":
        member = tarfile.TarInfo("././@PaxHeader")
        member.type = tarfile.XHDTYPE
    else:
        member = tarfile.TarInfo("././@LongLink")
        member.type = tarfile.GNUTYPE_LONGNAME
    packed = write_tar(tmp_path / "x.tgz", [(member, b"a" * (2 << 20)), entry("good")])
    with pytest.raises(ArchiveMismatch, match="header of 2,097,152 bytes"):
        extract_archive(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_of_too_many_members_is_refused(tmp_path, monkeypatch):
    """A file of a few bytes each would use up the disk's entries."""
    monkeypatch.setattr(archive, "MOST_MEMBERS", 3)
    packed = write_tar(tmp_path / "x.tgz", [entry(str(number)) for number in range(4)])
    with pytest.raises(ArchiveMismatch, match="more than 3 members"):
        extract_archive(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
