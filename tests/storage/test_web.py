import pytest

from qat.storage import web
from qat.storage.web import WebFiles
from tests.servers import file_server

DATA = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    """Servers on loopback need no rest."""
    monkeypatch.setattr(web, "WAIT_SECONDS", 0)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data.bin").write_bytes(DATA)
    return tmp_path


@pytest.mark.parametrize("ranges", [True, False])
def test_reading_starts_at_any_byte(folder, ranges):
    """The same bytes come from a server that skips and from one that sends all."""
    with file_server(folder, ranges=ranges) as server, WebFiles().open(server.url("data.bin")) as f:
        f.seek(5000)
        assert f.read(100) == DATA[5000:5100]
        assert f.read() == DATA[5100:]
        assert f.read() == b""
        f.seek(1)
        assert f.read(3) == DATA[1:4]
    ranged = [headers.get("Range") for _, _, headers in server.asked]
    assert "bytes=5000-" in ranged


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_taken_up_where_it_broke(folder, ranges):
    """A server that sends 3000 bytes and hangs up is asked again, from there."""
    with (
        file_server(folder, ranges=ranges, cut_after=3000, cuts=3) as server,
        WebFiles().open(server.url("data.bin")) as file,
    ):
        assert file.read() == DATA


def test_a_server_that_gives_nothing_more_ends_it(folder):
    """After some tries without a byte, one line tells what to do."""
    with (
        file_server(folder, cut_after=0, cuts=100) as server,
        WebFiles().open(server.url("data.bin")) as file,
        pytest.raises(OSError, match="run the same command again"),
    ):
        file.read()
    assert sum(method == "GET" for method, _, _ in server.asked) == web.TRIES


def test_what_came_before_the_end_is_kept(folder):
    """A short answer, then the error: a copy has written all that came."""
    with (
        file_server(folder, cut_after=3000, cuts=1) as server,
        WebFiles().open(server.url("data.bin")) as file,
    ):
        server.dies = True
        assert file.read() == DATA[:3000]
        with pytest.raises(OSError, match="500"):
            file.read()


def test_what_is_there_and_what_is_not(folder):
    """Absence is an answer, a server's failure and a dead address are errors that name it."""
    with file_server(folder) as server:
        files = WebFiles()
        assert files.exists(server.url("data.bin"))
        assert files.size(server.url("data.bin")) == len(DATA)
        assert files.cat_file(server.url("data.bin")) == DATA
        assert not files.exists(server.url("none.bin"))
        with pytest.raises(FileNotFoundError, match="none.bin does not exist"):
            files.open(server.url("none.bin"))
        with pytest.raises(ValueError, match="only be read"):
            files.open(server.url("data.bin"), "wb")
        server.status = 500
        with pytest.raises(OSError, match=r"500.*data\.bin"):
            files.exists(server.url("data.bin"))
        dead = server.url("data.bin")
    with pytest.raises(ConnectionError, match="cannot be reached"):
        files.exists(dead)


def test_servers_without_head_are_asked_otherwise(folder):
    """The size comes from the start of an answer then."""
    with file_server(folder, has_head=False) as server:
        assert WebFiles().size(server.url("data.bin")) == len(DATA)
