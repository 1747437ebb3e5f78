import pytest

from qat.storage import download as downloads
from qat.storage.archive import ArchiveMismatch
from qat.storage.download import (
    discard,
    download,
    file_info,
    is_file,
    is_folder,
    open_files,
    part_path,
    record_path,
    stated_sha256,
)
from qat.storage.files import sha256_of_file
from tests.servers import file_server

DATA = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    """Servers on loopback need no rest."""
    monkeypatch.setattr(downloads, "WAIT_SECONDS", 0)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "data.bin").write_bytes(DATA)
    return tmp_path / "served"


@pytest.fixture
def target(tmp_path):
    return tmp_path / "here" / "data.bin"


@pytest.fixture
def half(folder, target):
    """A download that was cut off after 5000 bytes, by a server that is gone now."""

    def cut_off(server):
        server.cut_after, server.cuts, server.dies = 5000, 1, True
        with pytest.raises(OSError, match=r"500.*run the same command again"):
            download(server.url("data.bin"), target)
        server.cuts, server.dies, server.status = 0, False, 0
        assert part_path(target).read_bytes() == DATA[:5000]
        assert not target.exists()
        server.asked.clear()

    return cut_off


@pytest.mark.recipe
@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_continues_where_it_was_cut(folder, target, half, ranges):
    """From a server that sends parts and from one that sends all of it again."""
    with file_server(folder, ranges=ranges) as server:
        half(server)
        digest = download(server.url("data.bin"), target)
    assert target.read_bytes() == DATA
    assert digest == sha256_of_file(folder / "data.bin")
    assert "bytes=5000-" in [headers.get("Range") for _, _, headers in server.asked]
    discard(target)
    assert list(target.parent.iterdir()) == []


@pytest.mark.recipe
@pytest.mark.parametrize("told_by", ["etag", "size", "checksum", "nothing"])
def test_a_half_file_is_not_continued_into_another_version(folder, target, half, told_by):
    """The new version is downloaded from its start; no mix of both gets the name."""
    changed = DATA[::-1] + b"more" * (told_by == "size")
    with file_server(folder) as server:
        server.has_etag = told_by == "etag"
        half(server)
        (folder / "data.bin").write_bytes(changed)
        if told_by == "checksum":
            digest = sha256_of_file(folder / "data.bin")
            (folder / "data.bin.sha256").write_text(digest)
        download(server.url("data.bin"), target)
    assert target.read_bytes() == changed
    assert all("Range" not in headers for _, _, headers in server.asked)


def test_a_whole_download_is_not_repeated(folder, target):
    """Until its record is removed, or the source changes."""
    with file_server(folder) as server:
        for _ in range(2):
            download(server.url("data.bin"), target)
        assert [m for m, path, _ in server.asked if path == "/data.bin"] == ["HEAD", "GET", "HEAD"]
        (folder / "data.bin").write_bytes(b"new")
        download(server.url("data.bin"), target)
    assert target.read_bytes() == b"new"
    assert record_path(target).is_file()


@pytest.mark.recipe
@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_taken_up_where_it_broke(folder, target, ranges):
    """A server that sends 3000 bytes and hangs up is asked again, in the same call."""
    with file_server(folder, ranges=ranges, cut_after=3000, cuts=3 if ranges else 1) as server:
        download(server.url("data.bin"), target)
    assert target.read_bytes() == DATA


@pytest.mark.recipe
def test_a_server_that_gives_nothing_more_ends_it(folder, target):
    """After some tries without a byte, one line tells what to do."""
    with (
        file_server(folder, cut_after=0, cuts=100) as server,
        pytest.raises(OSError, match="run the same command again"),
    ):
        download(server.url("data.bin"), target)
    gets = [method for method, path, _ in server.asked if (method, path) == ("GET", "/data.bin")]
    assert len(gets) == downloads.TRIES


@pytest.mark.parametrize("by", ["store", "registry"])
def test_a_wrong_checksum_leaves_nothing(folder, target, by):
    """Of the file next to the source, or given; the next call starts afresh."""
    if by == "store":
        (folder / "data.bin.sha256").write_text("0" * 64 + "  data.bin")
    expected = "1" * 64 if by == "registry" else None
    with pytest.raises(ArchiveMismatch, match=f"sha256.*{by} says"):
        download(str(folder / "data.bin"), target, sha256=expected)
    assert list(target.parent.iterdir()) == []
    (folder / "data.bin.sha256").write_text("none")
    with pytest.raises(ArchiveMismatch, match="holds no sha256"):
        download(str(folder / "data.bin"), target)


def test_what_is_there_and_what_is_not(folder, target):
    """Absence is an answer, a server's failure and a dead address are errors that name it."""
    with file_server(folder) as server:
        url, none = server.url("data.bin"), server.url("none.bin")
        assert is_file(url)
        assert not is_folder(url)
        assert file_info(url)["size"] == len(DATA)
        assert stated_sha256(url) is None
        assert not is_file(none)
        with pytest.raises(FileNotFoundError, match="none.bin does not exist"):
            download(none, target)
        server.status = 403
        with pytest.raises(PermissionError, match=r"data\.bin is refused \(403\)"):
            is_file(url)
        server.status = 500
        with pytest.raises(OSError, match=r"data\.bin.*500"):
            is_file(url)
    with pytest.raises(ConnectionError, match="cannot be reached"):
        is_file(url)
    assert is_folder(str(folder))
    assert not is_file(str(folder))
    assert not is_file(str(folder / "data.bin" / "below"))


def test_servers_without_head_are_asked_otherwise(folder, target):
    """The size comes from the start of an answer then."""
    with file_server(folder, has_head=False) as server:
        download(server.url("data.bin"), target)
    assert target.read_bytes() == DATA


def test_names_with_odd_signs(folder, target):
    """A space in a name is no URL; it is written as one."""
    (folder / "a b+c.bin").write_bytes(DATA)
    with file_server(folder) as server:
        download(server.url("a b+c.bin"), target)
    assert target.read_bytes() == DATA


def test_the_hub_is_a_file_system():
    """`hf://OWNER/NAME/...` is read through huggingface_hub."""
    from huggingface_hub import HfFileSystem

    files, path = open_files("hf://owner/name/folder/x.tar.lz4")
    assert isinstance(files, HfFileSystem)
    assert path == "owner/name/folder/x.tar.lz4"


def test_a_missing_package_is_named(monkeypatch):
    """fsspec tells which package opens gs://, in one line of ours."""
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(ValueError, match="gs://bucket.*needs another package.*gcsfs"):
        is_file("gs://bucket/x")


@pytest.mark.parametrize("honors", [True, False])
@pytest.mark.parametrize("has_etag", [True, False])
def test_a_file_that_changes_while_it_is_copied_is_not_mixed(
    folder, target, monkeypatch, honors, has_etag
):
    """Between the look at its version and the answer, or in the middle of it."""
    with file_server(folder, cut_after=5000, cuts=1) as server:
        server.honors_if_range, server.has_etag = honors, has_etag
        monkeypatch.setattr(
            downloads.time, "sleep", lambda _: (folder / "data.bin").write_bytes(b"x" * 9000)
        )
        with pytest.raises(ArchiveMismatch, match="has changed while it was copied.*again"):
            download(server.url("data.bin"), target)
        assert not target.exists()
        monkeypatch.setattr(downloads.time, "sleep", lambda _: None)
        download(server.url("data.bin"), target)
    assert target.read_bytes() == b"x" * 9000


@pytest.mark.recipe
def test_a_part_that_begins_elsewhere_is_refused(folder, target, half):
    """A server that sends another range than was asked for."""
    with file_server(folder) as server:
        half(server)
        server.range_shift = 7
        with pytest.raises(ArchiveMismatch, match="start of its Content-Range is 5007, not 5000"):
            download(server.url("data.bin"), target)
    assert not target.exists()


def test_plain_http_is_told(folder, target, caplog):
    """Whoever is in between can change what comes; loopback has nobody in between."""
    caplog.set_level("INFO", "qat")
    downloads.warn_of_plain_http("http://host/x.tgz")
    assert "http://host/x.tgz comes by http" in caplog.text
    caplog.clear()
    with file_server(folder) as server:
        download(server.url("data.bin"), target)
    assert "comes by http" not in caplog.text


def test_a_checksum_of_megabytes_is_not_read(folder, target):
    """It is one line; a server that sends more is not listened to."""
    (folder / "data.bin.sha256").write_text("0" * 100_000)
    with file_server(folder) as server, pytest.raises(ArchiveMismatch, match="holds no sha256"):
        download(server.url("data.bin"), target)
