"""Parts of a compression that leave their results and find them again; whole: test_compress."""

from qat.pipelines import compress_stages
from qat.pipelines.compress_stages import Clock, once, size_on_disk


def test_a_clock_goes_on_in_the_next_process(tmp_path, monkeypatch):
    """What earlier ones noted counts towards the limit; what they did not note is lost."""
    now = [100.0]
    monkeypatch.setattr(compress_stages.time, "perf_counter", lambda: now[0])
    first = Clock(tmp_path / "clock.json", minutes=1)
    now[0] += 20
    assert (first.seconds, first.left) == (20, 40)
    first.note()
    now[0] = 7.0  # another process counts from elsewhere
    second = Clock(tmp_path / "clock.json", minutes=1)
    now[0] += 5
    assert (second.seconds, second.left) == (25, 35)


def test_a_part_is_made_once_for_what_decides_it(tmp_path):
    """The same key finds it, another one makes it anew."""
    calls = []

    def make():
        calls.append(1)
        return {"steps": len(calls)}

    path = tmp_path / "parts" / "a.json"
    assert once(path, ["a", 1, None], make) == once(path, ["a", 1, None], make) == {"steps": 1}
    assert once(path, ["a", 2, None], make) == {"steps": 2}
    assert len(calls) == 2


def test_a_folder_is_as_large_as_its_files(tmp_path):
    """In folders of any depth; of a single file, that one's."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x").write_bytes(b"123")
    (tmp_path / "a" / "b" / "y").write_bytes(b"4567")
    assert size_on_disk(tmp_path) == 7
    assert size_on_disk(tmp_path / "a" / "x") == 3
