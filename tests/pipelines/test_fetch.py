import shutil

import pytest

from qat.cli.commands import main
from qat.storage.archive import sidecar
from tests.servers import file_server
from tests.tiny import save_tiny, tiny_cache, tiny_llama


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tiny_cache(tmp_path_factory.mktemp("cache"), name="tiny")


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty working folder without any store."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("QAT_STORE", "GDRIVE_PATH", "GCS_BUCKET"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "work"


@pytest.fixture
def packed(cache, tmp_path, work):
    """The packed cache on a server, at an address that does not tell its kind."""
    served = tmp_path / "served"
    served.mkdir()
    assert main("pack", [str(cache), "--output", str(served / "tiny.tar.lz4")]) == 0
    return served


@pytest.mark.recipe
def test_the_users_own_archive_stays(cache, packed, work):
    """`qat fetch` copied an archive to the path where `qat pack` writes, and then removed it."""
    shutil.copytree(cache, work / "caches" / "tiny")
    own = work / "caches" / "tiny.tar.lz4"
    assert main("pack", ["caches/tiny"]) == 0
    content = own.read_bytes()
    with file_server(packed) as server:
        url = server.url("tiny.tar.lz4")
        for flags in ([], ["--force"]):
            assert main("fetch", [url, "--output-dir", "caches", *flags]) == 0
            assert own.read_bytes() == content
            assert sidecar(own).is_file()


def test_somebodys_own_folder_is_not_replaced(cache, packed, work, capsys):
    """A build that was cut short, or any folder of that name, was replaced without a question."""
    (work / "caches" / "tiny").mkdir(parents=True)
    (work / "caches" / "tiny" / "notes.txt").write_text("mine")
    with file_server(packed) as server:
        url = server.url("tiny.tar.lz4")
        assert main("fetch", [url, "--output-dir", "caches"]) == 2
        assert "replace it with --force" in capsys.readouterr().err
        assert (work / "caches" / "tiny" / "notes.txt").read_text() == "mine"
        assert main("fetch", [url, "--output-dir", "caches", "--force"]) == 0
    assert (work / "caches" / "tiny" / "manifest.json").is_file()


@pytest.mark.parametrize("output_dir", ["caches", None])
def test_content_decides_what_an_archive_is(packed, work, capsys, output_dir):
    """A cache at an address that names none was taken for a checkpoint, as caches/tiny.pt."""
    flags = ["--output-dir", output_dir] if output_dir else []
    with file_server(packed) as server:
        assert main("fetch", [server.url("tiny.tar.lz4"), *flags]) == 0
    assert '"cache": "caches/tiny"' in capsys.readouterr().out
    assert (work / "caches" / "tiny" / "manifest.json").is_file()
    left = [path.name for path in work.rglob("*") if path.suffix in (".pt", ".part", ".fetching")]
    assert left == []


def test_a_checkpoint_under_a_caches_name_is_still_one(tmp_path, work, capsys):
    """The name is a guess, the content decides, also on the other side."""
    name = "thing_L64_K64_R128"
    save_tiny(tmp_path / "made" / name, tiny_llama())
    assert main("pack", [str(tmp_path / "made" / name)]) == 0
    capsys.readouterr()
    assert main("fetch", [str(tmp_path / "made" / f"{name}.tar.lz4")]) == 0
    assert f'"checkpoint": "runs/speedrun/{name}.pt"' in capsys.readouterr().out
    assert (work / "runs" / "speedrun" / f"{name}.pt" / "config.json").is_file()
