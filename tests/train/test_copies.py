import logging
import uuid
from pathlib import Path

import pytest

from qat.storage import download
from qat.train.copies import SNAPSHOT, RunCopies, files_of, how_far


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").replace(path)


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """A run whose output is an address, and whose results go to a folder as well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "WAIT_SECONDS", 0)
    made = RunCopies(Path(f"memory://{uuid.uuid4().hex}/run"), tmp_path / "drive")
    write(made.folder, metrics="1", best__weights="one", state__step_1__state="s", **{".x": "x"})
    return made


def there(mirror):
    return sorted(mirror.listing())


def test_states_go_to_the_output_alone(copies, tmp_path):
    """Results go to both places; hidden files stay; a plain folder is copied nowhere."""
    copies.push()
    assert there(copies.home) == ["best/weights", "metrics", "state/step_1/state"]
    assert there(copies.results) == ["best/weights", "metrics"]
    assert RunCopies(tmp_path / "run").places == ""
    assert RunCopies(tmp_path / "run").begin() is None


def test_a_snapshot_is_of_its_moment(copies):
    """What training writes until the state is whole is not in the copy; the state is."""
    finish = copies.begin()
    with (copies.folder / "metrics").open("a") as file:
        file.write("2")
    write(copies.folder, best__weights="two", state__step_2__state="s2")
    finish()
    root = copies.home.open()[1]
    read = copies.home.open()[0].cat_file
    assert read(f"{root}/metrics") == b"1"
    assert read(f"{root}/best/weights") == b"one"
    assert "state/step_2/state" in there(copies.home)
    assert not (copies.folder / SNAPSHOT).exists()
    copies.push()
    assert read(f"{root}/best/weights") == b"two"


def test_a_place_out_of_reach_does_not_end_training(copies, monkeypatch, caplog):
    """It is said; the end of a run, which nothing follows, fails."""

    def push(_files):
        raise ConnectionError("gone")

    monkeypatch.setattr(copies.home, "push", push)
    with caplog.at_level(logging.WARNING, logger="qat"):
        copies.begin()()
    assert "no copy is made of this interval: gone" in caplog.text
    with pytest.raises(ConnectionError, match="gone"):
        copies.push()


def test_how_far_a_run_is_follows_from_names():
    """Nothing, a whole state, a later one, the end."""
    half = ["config.json", "state/step_0000002/a.distcp"]
    one, two = ([f"state/step_{step:07d}/state.json"] for step in (5, 40))
    ordered = [half, one, one + two, ["summary.json"], ["summary.json", *two]]
    ranks = [how_far(names) for names in ordered]
    assert ranks == sorted(ranks)
    assert how_far([]) == how_far(half)


def test_hidden_files_are_nobodys(tmp_path):
    """Also in hidden folders."""
    write(tmp_path, a="a", **{".b__c": "c"})
    assert list(files_of(tmp_path)) == ["a"]
