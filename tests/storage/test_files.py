import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qat.storage.files import (
    atomic_file,
    atomic_folder,
    atomic_output,
    canonical_json,
    fingerprint,
    folder_lock,
    hold,
    read_json,
    recover_interrupted_replace,
    require_plain_name,
    sha256_of_file,
    sweep_leftovers,
    write_json,
    write_text,
)


def test_canonical_json_does_not_depend_on_order():
    """Equal values have one text, so one fingerprint; different values differ."""
    assert canonical_json({"b": [1, 2], "a": None}) == '{"a":null,"b":[1,2]}'
    assert fingerprint({"b": 1, "a": 2}) == fingerprint({"a": 2, "b": 1})
    assert fingerprint({"a": 2}) != fingerprint({"a": 3})


def test_a_fingerprint_is_the_start_of_the_sha256():
    """Sixteen hex digits of the canonical text's sha256, the same on every machine."""
    assert fingerprint({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()[:16]


def test_nan_has_no_json():
    """NaN would make a file that other programs cannot read."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"loss": float("nan")})


def test_json_comes_back(tmp_path):
    """What is written is read, also into a folder that is not there yet."""
    path = tmp_path / "new" / "value.json"
    write_json(path, {"a": [1, 2.5, "x"]})
    assert read_json(path) == {"a": [1, 2.5, "x"]} == json.loads(path.read_text())


@pytest.mark.parametrize("content", [b"{broken", b"\xff\xfe\x00", b""])
def test_a_file_that_is_not_json_is_named(tmp_path, content):
    """The message tells which file, so that it can be removed."""
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json is not JSON"):
        read_json(path)


def test_sha256_is_that_of_the_bytes(tmp_path):
    """The streamed sum equals the sum of the whole."""
    path = tmp_path / "data"
    path.write_bytes(b"abc" * 100_000)
    assert sha256_of_file(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_failed_write_leaves_the_previous_file_and_nothing_else(tmp_path):
    """A disk that fills up in the middle costs the new file only."""
    path = tmp_path / "file"
    write_text(path, "previous")

    def write_until_the_disk_is_full():
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_until_the_disk_is_full()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "previous"


def test_the_file_appears_only_when_whole(tmp_path):
    """Inside the block there is nothing under the final name; after it, the mode is usual."""
    path = tmp_path / "file"
    with atomic_file(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "whole"
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_folder_leaves_the_previous_one(tmp_path):
    """The same for a folder of several files."""
    path = tmp_path / "folder"
    with atomic_folder(path) as temporary:
        (temporary / "a").write_text("previous")

    def write_until_interrupted():
        with atomic_folder(path) as temporary:
            (temporary / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_until_interrupted()
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    assert (path / "a").read_text() == "previous"


def test_a_folder_is_replaced_as_one(tmp_path):
    """Files of the previous folder do not linger in the new one, nor aside."""
    path = tmp_path / "folder"
    for name in ("a", "b"):
        with atomic_folder(path) as temporary:
            (temporary / name).write_text(name)
    assert [entry.name for entry in path.iterdir()] == ["b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    assert path.stat().st_mode & 0o777 == 0o755


def write_folder(path, text):
    with atomic_folder(path) as temporary:
        (temporary / "a").write_text(text)


@pytest.fixture
def killed_swap(tmp_path):
    """A folder whose replacement died between its two renames; nothing was cleaned up."""
    path = tmp_path / "folder"
    write_folder(path, "previous")
    path.rename(tmp_path / ".folder.old")
    (tmp_path / ".folder.x.part").mkdir()
    (tmp_path / ".folder.x.part" / "a").write_text("unnamed")
    return path


def test_a_folder_hidden_by_a_kill_comes_back_to_a_reader(killed_swap):
    """A process killed between the two renames left no folder under the final name."""
    recover_interrupted_replace(killed_swap)
    assert (killed_swap / "a").read_text() == "previous"
    assert not (killed_swap.parent / ".folder.old").exists()


def test_the_next_write_clears_what_a_kill_left(killed_swap):
    """The previous folder comes back first, so that a failed write still keeps it."""
    with pytest.raises(OSError, match="No space"), atomic_folder(killed_swap):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (killed_swap / "a").read_text() == "previous"
    write_folder(killed_swap, "new")
    assert (killed_swap / "a").read_text() == "new"
    assert not (killed_swap.parent / ".folder.old").exists()


def test_a_kill_after_both_renames_costs_nothing(killed_swap):
    """The new folder has its name already: the hidden one is what goes."""
    write_folder(killed_swap, "new")
    write_folder(killed_swap.parent / ".folder.old", "previous")
    recover_interrupted_replace(killed_swap)
    assert (killed_swap / "a").read_text() == "new"
    assert not (killed_swap.parent / ".folder.old").exists()


def test_a_rename_that_fails_puts_the_previous_folder_back(tmp_path, monkeypatch):
    """Also without a kill, the name is never left empty."""
    path = tmp_path / "folder"
    write_folder(path, "previous")
    rename = Path.rename

    def fail_second(self, target):
        if self.suffix == ".part":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(OSError, match="Input/output"):
        write_folder(path, "new")
    assert (path / "a").read_text() == "previous"
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_files_reach_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    """A power cut after the rename must not leave names of empty files."""
    flushed = []

    def fsync(handle):
        name = Path(f"/proc/self/fd/{handle}").readlink().name
        flushed.append(((tmp_path / "folder").exists(), name))

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to name a handle")
    monkeypatch.setattr(os, "fsync", fsync)
    write_folder(tmp_path / "folder", "new")
    assert flushed == [(False, "a"), (True, tmp_path.name)]


def test_a_file_is_never_replaced_by_a_folder(tmp_path):
    """A mistyped output costs no file."""
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="notes is a file"):
        write_folder(tmp_path / "notes", "new")
    assert (tmp_path / "notes").read_text() == "mine"


HOLD = """
import sys
from qat.storage.files import folder_lock
with folder_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a folder's lock until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "folder")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


DAMAGED_OWNERS = (
    *(b"", b"\xff", b"[" * 30_000, b"[]", b"{}", b'{"pid": 1, "host": "a"}'),
    *(b'{"pid": 1, "host": "a\\nb", "since": ""}', b'{"pid": "\\ud800", "host": "", "since": ""}'),
    b'{"pid": [%s], "host": "a", "since": ""}' % b",".join([b"1"] * 999),
)


@pytest.mark.recipe
@pytest.mark.parametrize("content", DAMAGED_OWNERS)
def test_a_damaged_lock_holds_as_well(tmp_path, holder, content):
    """What its file says is only told where it is a line."""
    (lock,) = tmp_path.glob(".*.lock")
    lock.write_bytes(content)
    with (
        pytest.raises(ValueError, match=r"in use by another process; [^\n]*\Z"),
        folder_lock(tmp_path / "folder"),
    ):
        pass


@pytest.mark.recipe
def test_a_lock_tells_who_holds_it_and_ends_with_its_process(tmp_path, holder):
    """The message names process, host and time; a killed process holds nothing."""
    with (
        pytest.raises(ValueError, match=rf"in use by process {holder.pid} on \S+ since \d{{4}}-"),
        folder_lock(tmp_path / "folder"),
    ):
        pass
    holder.kill()
    holder.wait()
    with folder_lock(tmp_path / "folder"):
        pass
    with folder_lock(tmp_path / "folder"):
        pass


@pytest.mark.recipe
def test_a_lock_file_that_is_replaced_lets_nobody_else_in(tmp_path, monkeypatch):
    """A builder that had opened a lock file, removed by the one before, shared the folder."""
    import fcntl

    path, flock, inodes = tmp_path / ".folder.lock", fcntl.flock, []

    def flock_of_a_removed_file(handle, operation):
        if operation & fcntl.LOCK_EX and not inodes:
            path.unlink()
        inodes.append(os.fstat(handle).st_ino)
        return flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock_of_a_removed_file)
    with folder_lock(tmp_path / "folder"):
        assert path.stat().st_ino == inodes[-1]
        with pytest.raises(ValueError, match="in use"), folder_lock(tmp_path / "folder"):
            pass


def test_a_lock_file_that_is_removed_while_it_is_held_lets_nobody_in(tmp_path):
    """Somebody tidied up and a second process began in the same folder."""
    (tmp_path / "folder").mkdir()
    with folder_lock(tmp_path / "folder"):
        (tmp_path / ".folder.lock").unlink()
        refusal = pytest.raises(ValueError, match="in use by another process")
        with refusal, folder_lock(tmp_path / "folder"):
            pass
    with folder_lock(tmp_path / "folder"):
        pass


def test_what_killed_processes_left_is_swept(tmp_path):
    """Half files and folders at any depth go; a previous folder without a successor comes back."""
    (tmp_path / "best").mkdir()
    (tmp_path / ".a.json.x1.part").write_text("half")
    (tmp_path / "best" / ".b.x2.part").mkdir()
    (tmp_path / "best" / ".b.x2.part" / "file").write_text("half")
    (tmp_path / ".state.old").mkdir()
    (tmp_path / ".best.old").mkdir()
    (tmp_path / "kept.part").write_text("no hidden name: somebody's own")
    sweep_leftovers(tmp_path)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert names == ["best", "kept.part", "state"]


PART = ".inner.abcdefgh.part"  # as atomic_file names it


def test_what_another_process_holds_is_not_swept(tmp_path):
    """A run in the folder of a run: its half made files were removed while they were written."""
    inner = tmp_path / "deep" / "inner"
    (inner / "best").mkdir(parents=True)
    for half in (inner / ".a.part", inner / "best" / ".b.part", inner.parent / PART):
        half.write_text("half")
    (inner.parent / ".inner.old").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for held in (folder_lock(inner), hold(inner)):
        with held:
            sweep_leftovers(tmp_path)
            assert set(before) <= set(tmp_path.rglob("*"))
    with atomic_folder(tmp_path / "deep" / "made") as made, atomic_file(tmp_path / "file") as file:
        sweep_leftovers(tmp_path)
        assert made.is_dir()
        assert file.is_file()
    left = sorted(path.name for path in tmp_path.rglob("*"))
    assert left == [".inner.lock", "best", "deep", "file", "inner", "made"]


@pytest.mark.parametrize("way", [atomic_folder, atomic_output])
def test_what_a_killed_process_left_of_an_output_goes_with_the_next(tmp_path, way):
    """Gigabytes do not stay; those of other names, and what is being written, do."""
    left, other = tmp_path / ".made.abcdefgh.part", tmp_path / ".made.it.abcdefgh.part"
    for half in (left, other):
        half.mkdir()
        (half / "file").write_text("half")
    with way(tmp_path / "made") as first:
        assert not left.exists()
        first.mkdir(exist_ok=True)
        with way(tmp_path / "made") as second:
            assert first.is_dir()
            second.mkdir(exist_ok=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "made"]


def test_an_output_comes_after_what_lies_next_to_it(tmp_path, monkeypatch):
    """Killed between two renames, the output is not there; the same call again gives it all."""

    def write():
        with atomic_output(tmp_path / "a.gguf") as place:
            place.write_text("weights")
            place.with_suffix(".md").write_text("card")

    def stop(path, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            write()
    assert list(tmp_path.iterdir()) == []
    rename, renamed = Path.replace, []
    monkeypatch.setattr(Path, "replace", lambda p, t: renamed.append(t.name) or rename(p, t))
    write()
    assert renamed == ["a.md", "a.gguf"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "a.md"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "a/b", "/a", "a\\b", "C:a", "a\n", "x" * 256]
)
def test_a_name_is_one_part_of_a_path(name):
    """What would land elsewhere, or be hidden, is refused with its flag."""
    require_plain_name("v2_q2a4.mlp-1", "--name")
    with pytest.raises(ValueError, match="--name .* is no plain name; leave out"):
        require_plain_name(name, "--name")
