"""What a benchmark's fresh process tells of its memory, and what it reads."""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qat.benchmark.config import DEFAULT_LENGTH, DEFAULT_MODEL, BenchmarkConfig
from qat.model.surgery import quantized_layers
from qat.pipelines import batch_probe
from qat.pipelines.batch_probe import batches_of, length, load_student, probe, sources
from qat.train.config import TrainConfig
from tests.tiny import save_tiny, tiny_llama

CPU = {"device": "cpu", "dtype": "fp32"}


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("not enough memory: 9")])
def test_too_little_memory_is_a_status(monkeypatch, error):
    """The search goes on with a smaller batch."""

    def measure(_config, _device):
        raise error

    monkeypatch.setattr(batch_probe, "measure", measure)
    found = probe(BenchmarkConfig(probe=4, **CPU))
    assert found == {"status": "OOM", "why": str(error)}


def test_any_other_failure_ends_the_process(monkeypatch):
    """A shape that does not fit is no matter of memory."""

    def measure(_config, _device):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(batch_probe, "measure", measure)
    with pytest.raises(RuntimeError, match="mat1"):
        probe(BenchmarkConfig(probe=4, **CPU))
    row = {"loss": 1.0, "step_bytes": 3, "peak_bytes": 4}
    monkeypatch.setattr(batch_probe, "measure", lambda *_: row)
    assert probe(BenchmarkConfig(probe=4, **CPU)) == {"status": "OK", **row}


def test_sequences_are_as_long_as_the_cache_allows():
    """Its own length when none is given; a longer one is refused with the remedy."""
    cache = SimpleNamespace(seq_len=16)
    assert length(BenchmarkConfig(), None) == DEFAULT_LENGTH
    assert length(BenchmarkConfig(), cache) == 16
    assert length(BenchmarkConfig(seq_len=8), cache) == 8
    assert length(BenchmarkConfig(seq_len=99), None) == 99
    with pytest.raises(ValueError, match=r"--seq-len 99 is longer than the cache's blocks of 16"):
        length(BenchmarkConfig(seq_len=99), cache)


def test_without_a_cache_one_random_batch_repeats():
    """Of the default model unless another is named; tokens are of the vocabulary."""
    assert sources(BenchmarkConfig()) == (None, DEFAULT_MODEL)
    assert sources(BenchmarkConfig(model_id="m")) == (None, "m")
    settings = TrainConfig(
        checkpoint=Path("s"), cache_dir=Path(), output_dir=Path(), batch_size=3, curriculum="8:0"
    )
    first, second = islice(batches_of(settings, None, 50, torch.device("cpu")), 2)
    assert first is second
    assert first.token_ids.shape == (3, 8)
    assert first.token_ids.max() < 50


def test_a_student_is_made_where_none_is_named(tmp_path):
    """Of the model, quantized for its shape alone."""
    base = str(save_tiny(tmp_path / "m", tiny_llama()))
    student = load_student(BenchmarkConfig(model_id=base, **CPU), base, torch.float32)
    assert len(quantized_layers(student)) == 14
