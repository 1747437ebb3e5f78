import errno
import os
import shutil
import uuid
from pathlib import Path

import fsspec
import pytest

from qat.storage import download, files, stores
from qat.storage.archive import ArchiveMismatch, pack_folder, sidecar
from qat.storage.receipt import read_receipt
from qat.storage.stores import Found, Store, find_stores, locate, locate_address, put
from tests.servers import file_server

KINDS = ("folder", "file", "memory", "web", "web without ranges")
FOLDER = "qwen3_caches"


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    """Servers on loopback need no rest."""
    monkeypatch.setattr(download, "WAIT_SECONDS", 0)


@pytest.fixture
def content(tmp_path):
    """A folder of files of which some pack and some do not."""
    made = tmp_path / "made" / "thing"
    (made / "inner").mkdir(parents=True)
    (made / "a.bin").write_bytes(os.urandom(300_000))
    (made / "inner" / "b.txt").write_text("text " * 1000)
    return made


@pytest.fixture
def base(tmp_path):
    (tmp_path / "store" / FOLDER).mkdir(parents=True)
    return tmp_path / "store"


@pytest.fixture
def make_store(request, base):
    """Serve the store's folder in a given way."""

    def make(kind):
        if kind in ("folder", "file"):
            return stores.named_store(base.as_uri() if kind == "file" else str(base), "--store")
        if kind == "memory":
            memory, root = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
            for path in base.rglob("*"):
                if path.is_file():
                    memory.pipe_file(f"{root}/{path.relative_to(base)}", path.read_bytes())
            request.addfinalizer(lambda: memory.rm(root, recursive=True))
            return stores.named_store(f"memory:/{root}", "--store")
        server = file_server(base, ranges=kind == "web")
        state = server.__enter__()
        request.addfinalizer(lambda: server.__exit__(None, None, None))
        return stores.named_store(state.url(), "--store")

    return make


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files."""
    files = [
        {str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file()}
        for f in (one, other)
    ]
    return files[0] == files[1]


def accept(_folder):
    """Check nothing."""


def take(found, target, *, check, **more):
    """Take a thing to a known place."""

    def choose_target(folder):
        check(folder)
        return target

    return stores.take(found, target.parent, choose_target, **more)


def hidden(folder: Path) -> set[str]:
    """What lies about that nobody asked for, but for locks."""
    names = {path.name for path in folder.iterdir()}
    return {name for name in names if name.startswith(".") and not name.endswith(".lock")}


def shown(folder: Path) -> list[str]:
    """All but locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".tar.lz4", ".tgz"])
def test_an_archive_comes_out_of_every_kind_of_store(
    content, base, tmp_path, make_store, kind, suffix
):
    """Whole, under its name, with a receipt and nothing else next to it."""
    pack_folder(content, base / FOLDER / f"thing{suffix}")
    found = locate([make_store(kind)], FOLDER, "thing")
    assert found.form == "archive"
    target = tmp_path / "here" / "thing"
    take(found, target, check=accept)
    assert same(target, content)
    assert hidden(target.parent) == {".thing.fetched.json"}
    assert len(shown(target.parent)) == 2
    digest = sidecar(base / FOLDER / f"thing{suffix}").read_text().split()[0]
    assert read_receipt(target).sha256 == digest


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_folder_comes_out_of_every_kind_of_store(content, base, tmp_path, make_store, kind):
    """Also from the web where its files are named; one nested in one of its name is taken out."""

    shutil.copytree(content, base / FOLDER / "thing")
    files = ("a.bin", "inner/b.txt", "not there") if kind.startswith("web") else ()
    found = locate([make_store(kind)], FOLDER, "thing", files)
    assert found.form == "folder"
    target = tmp_path / "here" / "thing"
    take(found, target, check=accept, files=files)
    assert same(target, content)
    assert hidden(target.parent) == {".thing.fetched.json"}


def test_a_nested_plain_folder_is_unnested(content, base, tmp_path, make_store):
    """NAME/NAME/files gives NAME/files."""
    shutil.copytree(content, base / FOLDER / "thing" / "thing")
    target = tmp_path / "here" / "thing"
    take(locate([make_store("folder")], FOLDER, "thing"), target, check=accept)
    assert same(target, content)


def test_lz4_goes_before_tgz_and_that_before_a_folder(content, base, make_store):
    """What unpacks fastest is taken; a name with a suffix means that file."""
    store = make_store("folder")
    shutil.copytree(content, base / FOLDER / "thing")
    assert locate([store], FOLDER, "thing").address.endswith("/thing")
    pack_folder(content, base / FOLDER / "thing.tgz")
    assert locate([store], FOLDER, "thing").address.endswith(".tgz")
    pack_folder(content, base / FOLDER / "thing.tar.lz4")
    assert locate([store], FOLDER, "thing").address.endswith(".tar.lz4")
    assert locate([store], FOLDER, "thing.tgz").address.endswith(".tgz")
    assert locate([store], FOLDER, "other") is None
    (base / FOLDER / "x.pt").write_bytes(b"x")
    (base / FOLDER / "config.json").write_text("{}")
    found = locate([store], FOLDER, "x.pt")
    target = base / "x.pt"
    take(found, target, check=accept)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "x.pt"]


def test_stores_are_tried_in_order(tmp_path, monkeypatch):
    """QAT_STORE, Colab's Drive, GDRIVE_PATH, ~/gdrive, GCS_BUCKET."""
    folders = {name: tmp_path / name for name in ("own", "drive", "mounted", "home")}
    for folder in folders.values():
        folder.mkdir()
    (folders["home"] / "gdrive").mkdir()
    monkeypatch.setattr(stores, "COLAB_DRIVE", folders["drive"])
    environment = {
        "QAT_STORE": str(folders["own"]),
        "GDRIVE_PATH": str(folders["mounted"]),
        "HOME": str(folders["home"]),
        "GCS_BUCKET": "gs://bucket",
    }
    found = find_stores(environment)
    names = ["QAT_STORE", "Colab's Drive", "GDRIVE_PATH", "~/gdrive", "GCS_BUCKET"]
    assert [store.name for store in found] == names
    assert [store.base for store in found][-2:] == [str(folders["home"] / "gdrive"), "gs://bucket"]
    monkeypatch.setattr(stores, "COLAB_DRIVE", tmp_path / "none")
    assert find_stores({"HOME": str(tmp_path)}) == []
    assert find_stores({"HOME": str(tmp_path), "QAT_STORE": "s3://b/x/"})[0].base == "s3://b/x"
    with pytest.raises(FileNotFoundError, match="GDRIVE_PATH .* is no folder; mount it"):
        find_stores({"HOME": str(tmp_path), "GDRIVE_PATH": str(tmp_path / "none")})


def test_the_first_store_that_has_it_gives_it(content, tmp_path):
    """A store without it is passed over."""
    pack_folder(content, tmp_path / "second" / FOLDER / "thing.tgz")
    (tmp_path / "first").mkdir()
    both = [stores.named_store(str(tmp_path / name), name) for name in ("first", "second")]
    assert "second" in locate(both, FOLDER, "thing").address


def test_a_bucket_that_may_not_be_listed_gives_what_it_has(content, base, tmp_path, caplog):
    """It says 403 of all that is not there; where nothing is found, that is told."""
    pack_folder(content, base / FOLDER / "thing.tgz")
    (base / FOLDER / "thing.tgz.sha256").unlink()
    (base / FOLDER / "x.pt").write_bytes(b"x")
    with file_server(base) as server, file_server(base) as other:
        server.absent_status = other.absent_status = 403
        places = [stores.named_store(one.url(), "--store") for one in (server, other)]
        found = locate(places, FOLDER, "thing")
        assert found.address.endswith("/thing.tgz")
        assert same(take(found, tmp_path / "thing", check=accept), content)
        single = locate(places, FOLDER, "x.pt")
        with caplog.at_level("INFO"):
            take(single, tmp_path / "x.pt", check=accept)
        assert "config.json is not there, or may not be read: it is left out" in caplog.text
        assert [path.name for path in (tmp_path / "x.pt").iterdir()] == ["x.pt"]
        with pytest.raises(PermissionError, match=r"none\.tar\.lz4 is refused \(403\)"):
            locate(places, FOLDER, "none")


@pytest.mark.recipe
@pytest.mark.parametrize("ranges", [True, False])
def test_a_copy_that_was_cut_continues(content, base, tmp_path, ranges):
    """The next call asks for the rest only, and what was there before stays until then."""
    pack_folder(content, base / FOLDER / "thing.tar.lz4")
    target = tmp_path / "here" / "thing"
    target.mkdir(parents=True)
    (target / "old").write_text("old")
    with file_server(base, ranges=ranges, cut_after=100_000, cuts=1) as server:
        found = locate([stores.named_store(server.url(), "--store")], FOLDER, "thing")
        server.dies = True
        with pytest.raises(OSError, match="500"):
            take(found, target, check=accept)
        assert (target / "old").read_text() == "old"
        have = (target.parent / ".thing.tar.lz4.part").stat().st_size
        assert have == 100_000
        server.status = server.cuts = 0
        take(found, target, check=accept)
        assert server.asked[-1][2].get("Range") == f"bytes={have}-"
    assert same(target, content)
    assert hidden(target.parent) == {".thing.fetched.json"}


@pytest.mark.recipe
def test_a_thing_is_taken_by_one_process_at_a_time(content, base, tmp_path, make_store):
    """Two that append to one copy would spoil it."""
    pack_folder(content, base / FOLDER / "thing.tgz")
    found = locate([make_store("folder")], FOLDER, "thing")
    target = tmp_path / "here" / "thing"
    with files.folder_lock(target.parent / "thing.tgz"), pytest.raises(ValueError, match="in use"):
        take(found, target, check=accept)
    take(found, target, check=accept)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_checksum_replaces_nothing(content, base, tmp_path, make_store, kind):
    """What was there stays, the bad copy goes, so that the next call starts afresh."""
    packed = base / FOLDER / "thing.tgz"
    pack_folder(content, packed)
    sidecar(packed).write_text("0" * 64 + "  thing.tgz\n")
    target = tmp_path / "here" / "thing"
    target.mkdir(parents=True)
    (target / "old").write_text("old")
    found = locate([make_store(kind)], FOLDER, "thing")
    with pytest.raises(ArchiveMismatch, match="sha256"):
        take(found, target, check=accept)
    assert shown(target.parent) == ["thing"]
    assert (target / "old").exists()
    sidecar(packed).unlink()
    with pytest.raises(ArchiveMismatch, match="registry says"):
        take(found, target, check=accept, sha256="1" * 64) if kind != "memory" else take(
            locate([make_store(kind)], FOLDER, "thing"), target, check=accept, sha256="1" * 64
        )
    assert shown(target.parent) == ["thing"]


def test_a_cut_archive_without_a_checksum_is_not_kept(content, base, tmp_path):
    """Else the next call would find the bad copy and never ask the store again."""
    packed = base / FOLDER / "thing.tar.lz4"
    pack_folder(content, packed)
    sidecar(packed).unlink()
    packed.write_bytes(packed.read_bytes()[:-1000])
    target = tmp_path / "here" / "thing"
    with file_server(base) as server:
        found = locate([stores.named_store(server.url(), "--store")], FOLDER, "thing")
        with pytest.raises(ArchiveMismatch, match="cut or altered"):
            take(found, target, check=accept)
        assert shown(target.parent) == []
        pack_folder(content, packed)
        take(found, target, check=accept)
    assert same(target, content)


@pytest.mark.parametrize("known", ["nothing", "sidecar", "registry"])
def test_what_no_checksum_is_known_of_is_said_to_be_unverified(
    content, base, tmp_path, caplog, known
):
    """With the one that it has, for the registry."""
    packed = base / FOLDER / "thing.tgz"
    pack_folder(content, packed)
    sha256 = files.sha256_of_file(packed)
    if known != "sidecar":
        sidecar(packed).unlink()
    found = locate([stores.named_store(str(base), "--store")], FOLDER, "thing")
    with caplog.at_level("INFO"):
        given = sha256 if known == "registry" else None
        take(found, tmp_path / "thing", check=accept, sha256=given)
    said = f"is unverified: no checksum is known of it; it has sha256 {sha256}" in caplog.text
    assert said == (known == "nothing")


def test_what_the_check_refuses_replaces_nothing(content, base, tmp_path, make_store):
    """The check sees the new folder before it has the name."""
    pack_folder(content, base / FOLDER / "thing.tgz")
    target = tmp_path / "here" / "thing"
    target.mkdir(parents=True)

    def refuse(folder):
        assert same(folder, content)
        raise ValueError("no cache")

    with pytest.raises(ValueError, match="no cache"):
        take(locate([make_store("folder")], FOLDER, "thing"), target, check=refuse)
    assert shown(target.parent) == ["thing"]
    assert list(target.iterdir()) == []


def test_a_receipt_speaks_only_for_what_was_taken(content, base, tmp_path, make_store):
    """A changed or missing file voids it; a file more does not."""
    pack_folder(content, base / FOLDER / "thing.tgz")
    target = tmp_path / "here" / "thing"
    found = locate([make_store("folder")], FOLDER, "thing")
    take(found, target, check=accept)
    (target / "more").write_text("more")
    assert read_receipt(target) is not None
    (target / "a.bin").write_bytes(b"short")
    assert read_receipt(target) is None
    take(found, target, check=accept)
    (target / "inner" / "b.txt").unlink()
    assert read_receipt(target) is None


def test_a_full_disk_is_told_before_anything_is_written(content, base, tmp_path, monkeypatch):
    """The needed and the free bytes are in the message; nothing is left."""
    pack_folder(content, base / FOLDER / "thing.tgz")
    usage = files.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    target = tmp_path / "here" / "thing"
    found = locate([Store("mount", str(base))], FOLDER, "thing")
    with pytest.raises(OSError, match="free some space"):
        take(found, target, check=accept)
    assert shown(target.parent) == []


@pytest.mark.parametrize("kind", ["folder", "file", "memory"])
def test_what_is_put_can_be_taken(content, tmp_path, make_store, kind):
    """An archive and its checksum; the folder of the store is made."""
    store = make_store(kind)
    packed = tmp_path / "thing.tgz"
    pack_folder(content, packed)
    address = put(packed, store, "qwen3_runs")
    assert address == f"{store.base}/qwen3_runs/thing.tgz"
    target = tmp_path / "here" / "thing"
    take(locate([store], "qwen3_runs", "thing"), target, check=accept, sha256=None)
    assert same(target, content)
    system, path = download.open_files(f"{store.base}/qwen3_runs")
    names = sorted(name.rpartition("/")[2] for name in system.find(path))
    assert names == ["thing.tgz", "thing.tgz.sha256"]


@pytest.mark.parametrize("kind", ["folder", "memory"])
@pytest.mark.parametrize("cut", ["raises", "short"])
def test_a_put_that_is_cut_off_leaves_the_previous_one(
    content, tmp_path, make_store, monkeypatch, kind, cut
):
    """The previous archive and its checksum still fit each other; the next put succeeds."""
    store = make_store(kind)
    packed = tmp_path / "thing.tgz"
    pack_folder(content, packed)
    put(packed, store, FOLDER)
    system, _ = download.open_files(store.base)
    put_file = type(system).put_file

    def dying(self, source, target, **more):
        half = tmp_path / "half"
        half.write_bytes(Path(source).read_bytes()[:1000])
        put_file(self, str(half), target, **more)
        if cut == "raises":
            raise OSError(errno.ENOSPC, "No space left on device")

    (content / "new").write_text("new")
    pack_folder(content, packed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(system), "put_file", dying)
        with pytest.raises(OSError, match="No space" if cut == "raises" else "only a part"):
            put(packed, store, FOLDER)
    target = tmp_path / "here" / "thing"
    take(locate([store], FOLDER, "thing"), target, check=accept)
    assert not (target / "new").exists()
    put(packed, store, FOLDER)
    take(locate([store], FOLDER, "thing"), target, check=accept)
    assert (target / "new").exists()


def test_addresses_say_what_they_are(content, tmp_path):
    """A folder, an archive, neither, nothing; the web takes nothing in."""
    assert locate_address(str(content)) == Found(str(content), "folder")
    packed = tmp_path / "thing.tgz"
    pack_folder(content, packed)
    assert locate_address(packed.as_uri()).form == "archive"
    with pytest.raises(ValueError, match="give an archive"):
        locate_address(str(content / "a.bin"))
    with pytest.raises(FileNotFoundError, match="check its name"):
        locate_address(str(tmp_path / "none.tgz"))
    with pytest.raises(ValueError, match="only be read"):
        put(packed, Store("web", "https://127.0.0.1/x"), FOLDER)
