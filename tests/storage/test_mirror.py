import logging
import uuid

import fsspec
import pytest

from qat.storage import download
from qat.storage.mirror import JOURNAL, PUSHING, Mirror


class Killed(BaseException):
    """Ends a push where nothing may clean up after it."""


@pytest.fixture
def made(tmp_path):
    """A folder of two files, one of them deep."""
    folder = tmp_path / "run"
    (folder / "best").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "best" / "weights").write_bytes(b"first")
    return folder


@pytest.fixture(params=["memory", "folder"])
def address(request, tmp_path):
    """An empty place."""
    return f"memory:///{uuid.uuid4().hex}" if request.param == "memory" else str(tmp_path / "drive")


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}


def content(address):
    system, root = fsspec.url_to_fs(address)
    return {path[len(root) + 1 :]: system.cat_file(path) for path in system.find(root)}


def test_a_push_sends_what_is_lacking_alone(made, address):
    """New, changed and lost files go there, removed ones go; what others put there stays."""
    mirror = Mirror(made, address)
    assert sorted(mirror.push(files_of(made))) == ["best/weights", "config.json"]
    assert mirror.push(files_of(made)) == []
    system, root = fsspec.url_to_fs(address)
    system.pipe_file(f"{root}/notes", b"of a person")
    (made / "best" / "weights").write_bytes(b"second")
    (made / "config.json").unlink()
    assert mirror.push(files_of(made)) == ["best/weights"]
    assert content(address) == {"best/weights": b"second", "notes": b"of a person"}
    system.rm_file(f"{root}/best/weights")
    assert mirror.push(files_of(made)) == ["best/weights"]


@pytest.mark.parametrize("method", ["put", "pipe_file", "mv", "rm_file"])
def test_a_push_killed_in_any_stage_is_all_or_nothing(made, address, monkeypatch, method):
    """Whoever looks next finds one push or the other, never some files of each."""
    mirror = Mirror(made, address)
    mirror.push(files_of(made))
    before = content(address)
    (made / "best" / "weights").write_bytes(b"second")
    (made / "config.json").write_text('{"a": 1}')
    after = {name: path.read_bytes() for name, path in files_of(made).items()}
    kind = type(mirror.open()[0])
    act, calls = getattr(kind, method), []

    def kill(self, *arguments, **more):
        calls.append(arguments)
        if len(calls) > 1 or method in ("pipe_file", "rm_file"):
            raise Killed
        if method == "put":  # one file of two
            arguments = [part[:1] for part in arguments]
        act(self, *arguments, **more)
        if method == "put":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(kind, method, kill)
        with pytest.raises(Killed):
            mirror.push(files_of(made))
    other = Mirror(made.with_name("other"), address)
    assert other.bring(lambda *_: False)
    expected = after if method in ("mv", "rm_file") else before
    assert content(address) == expected
    found = {name: path.read_bytes() for name, path in files_of(other.folder).items()}
    assert found == expected


def test_the_newer_side_wins(made, address):
    """A folder that is ahead of its copy stays, one that is behind is replaced; then both agree."""
    mirror = Mirror(made, address)
    mirror.push(files_of(made))
    there, here = ["best/weights", "config.json"], ["best", "best/weights", "config.json"]
    asked = []
    assert not mirror.bring(lambda *names: asked.append([sorted(part) for part in names]))
    assert asked == [[there, here]]
    (made / "best" / "weights").write_bytes(b"other")
    (made / "more").write_text("more")
    assert mirror.bring(lambda *_: True)
    assert sorted(files_of(made)) == there
    assert mirror.push(files_of(made)) == []


def test_a_broken_connection_is_tried_again(made, address, monkeypatch, caplog):
    """Some failures are lived with; a refusal is told at once, another failure after some tries."""
    monkeypatch.setattr(download, "WAIT_SECONDS", 0)
    mirror = Mirror(made, address)
    kind = type(mirror.open()[0])
    put, failures = kind.put, [ConnectionError("cut"), TimeoutError("slow")]

    def failing(self, *arguments):
        if failures:
            raise failures.pop()
        return put(self, *arguments)

    monkeypatch.setattr(kind, "put", failing)
    caplog.set_level(logging.INFO, logger="qat")
    assert len(mirror.push(files_of(made))) == 2
    (made / "config.json").write_text("changed")
    failures[:] = [PermissionError("no")]
    with pytest.raises(PermissionError, match="no"):
        mirror.push(files_of(made))
    failures[:] = [ConnectionError("cut")] * download.TRIES
    with pytest.raises(ConnectionError, match="cut"):
        mirror.push(files_of(made))
    assert not failures


def test_names_of_a_journal_reach_nothing_else(made, address, tmp_path):
    """What it names and was not pushed is neither moved nor removed."""
    mirror = Mirror(made, address)
    mirror.push(files_of(made))
    system, root = mirror.open()
    outside = tmp_path / "outside"
    outside.write_text("kept")
    journal = '{"put": ["../outside"], "removed": ["../outside", "none"]}'
    system.pipe_file(f"{root}/{JOURNAL}", journal.encode())
    system.pipe_file(f"{root}/{PUSHING}/left", b"half")
    assert mirror.push(files_of(made)) == []
    assert outside.read_text() == "kept"
    assert sorted(content(address)) == ["best/weights", "config.json"]


def test_a_damaged_journal_is_named(made, address):
    """It is of others; nothing is moved by it."""
    mirror = Mirror(made, address)
    mirror.push(files_of(made))
    system, root = mirror.open()
    for text in (b"{", b"[]", b"\xff", b'{"put": [1], "removed": []}', b'{"put": []}'):
        system.pipe_file(f"{root}/{JOURNAL}", text)
        with pytest.raises(ValueError, match=r"\.pushing\.json"):
            mirror.push(files_of(made))


def test_the_web_takes_nothing(tmp_path):
    """It is told before anything is trained."""
    with pytest.raises(ValueError, match="can only be read"):
        Mirror(tmp_path, "https://host/run")
