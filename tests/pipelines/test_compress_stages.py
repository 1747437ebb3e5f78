"""Parts of a compression that leave their results and find them again; whole: test_compress."""

from types import SimpleNamespace

import numpy as np
import pytest

from qat.pipelines import compress_stages
from qat.pipelines.compress_stages import Clock, once, size_on_disk, spread_batches
from qat.pipelines.quantize_config import CALIBRATION_TOKENS


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


@pytest.mark.parametrize("num_sequences", [3, 200, 5000])
def test_calibration_is_spread_over_the_training_part(num_sequences):
    """As many sequences as calibrate, first to nearly last, each once, held-out ones never."""
    seq_len, ids = 256, np.arange(10, 10 + num_sequences)
    read = []

    def batch(chosen):
        read.extend(chosen.tolist())
        return SimpleNamespace(input_ids=chosen, document_ids=None)

    cache = SimpleNamespace(
        sequence_ids=lambda part: {"train": ids}[part], seq_len=seq_len, batch=batch
    )
    batches = spread_batches(cache)
    expected = min(num_sequences, CALIBRATION_TOKENS["hessian"] // seq_len)
    assert len(read) == len(set(read)) == expected
    assert sum(len(tokens[0]) for tokens in batches) == expected
    assert set(read) <= set(ids.tolist())
    assert read[0] == 10
    assert read == sorted(read)
    assert read[-1] >= 10 + num_sequences / 2


def test_a_folder_is_as_large_as_its_files(tmp_path):
    """In folders of any depth; of a single file, that one's."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x").write_bytes(b"123")
    (tmp_path / "a" / "b" / "y").write_bytes(b"4567")
    assert size_on_disk(tmp_path) == 7
    assert size_on_disk(tmp_path / "a" / "x") == 3
