import subprocess

import pytest

from qat.tracking.environment import (
    add_session,
    commit_of,
    describe_environment,
    read_sessions,
)


def test_a_session_tells_where_and_how(monkeypatch):
    """Device, machine, versions and the call as typed."""
    monkeypatch.setattr("sys.argv", ["qat", "train", "--lr", "1"])
    told = describe_environment("cpu")
    assert told["device"].startswith("device cpu (asked for)")
    assert told["command"] == ["qat", "train", "--lr", "1"]
    assert {"qat", "torch"} <= told["versions"].keys()
    assert "cores" in told["machine"]


def test_a_resumed_run_keeps_its_former_sessions(tmp_path):
    """A run that starts over has one session only."""
    told = {"device": "cpu", "machine": "m", "started": "2026-01-01", "commit": None}
    add_session(tmp_path, {**told, "n": 1}, is_resumed=False)
    add_session(tmp_path, {**told, "n": 2}, is_resumed=True)
    assert [one["n"] for one in read_sessions(tmp_path)] == [1, 2]
    add_session(tmp_path, {**told, "n": 3}, is_resumed=False)
    assert read_sessions(tmp_path) == [{**told, "n": 3}]
    (tmp_path / "environment.json").write_text('[{"device": 1}]')
    with pytest.raises(ValueError, match=r"environment\.json: .*device"):
        read_sessions(tmp_path)
    assert read_sessions(tmp_path / "none") == []


def test_the_commit_is_marked_where_files_differ(tmp_path, monkeypatch):
    """No git, no commit: None."""
    assert commit_of(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    clean = commit_of(tmp_path)
    assert clean
    (tmp_path / "file").write_text("2")
    assert commit_of(tmp_path) == f"{clean}+changes"
    monkeypatch.setenv("PATH", "/none")
    assert commit_of(tmp_path) is None
