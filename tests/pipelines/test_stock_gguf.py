"""Files that llama.cpp's own quantizer makes, as peers."""

from importlib.util import find_spec

import pytest

from qat.pipelines.compress_config import FrontierConfig
from qat.pipelines.frontier import frontier
from qat.pipelines.stock_gguf import StockType
from qat.storage.files import write_json
from tests.tiny import save_tiny, tiny_llama, tiny_records, write_jsonl


def test_types_are_listed_with_their_embeddings():
    """A slash names the type of the embedding."""
    assert StockType.listed("") == []
    found = StockType.listed("iq4_nl, Q4_K/q6_k")
    assert [(one.name, one.embedding) for one in found] == [
        ("IQ4_NL", "iq4_nl"),
        ("Q4_K", "q6_k"),
    ]


@pytest.mark.parity
def test_llama_cpp_makes_peers_of_the_same_model_and_text(tmp_path):
    """Each type becomes a point; one of more bits is nearer; a second call makes none anew."""
    if find_spec("ik_llama_cpp") is None:
        pytest.skip("ik-llama-cpp-python is not installed; `make parity` installs it")
    save_tiny(tmp_path / "model", tiny_llama())
    write_jsonl(tmp_path / "data.jsonl", tiny_records(120))
    config = FrontierConfig(
        model=str(tmp_path / "model"),
        data=str(tmp_path / "data.jsonl"),
        output=tmp_path / "report",
        sizes="90KB",
        minutes=0,
        num_sequences=64,
        seq_len=32,
        stock="Q4_0,Q8_0/q8_0,NONE_SUCH",
        dtype="fp32",
        device="cpu",
    )
    points = {point["label"]: point for point in frontier(config).points}
    four, eight = points["model-Q4_0-iq4_nl"], points["model-Q8_0-q8_0"]
    assert four["file_bytes"] < eight["file_bytes"]
    assert 0 < eight["kl_nats"] < four["kl_nats"]
    made = tmp_path / "report" / "stock" / "model-Q4_0-iq4_nl.gguf"
    before = made.stat().st_mtime_ns
    frontier(config)
    assert made.stat().st_mtime_ns == before
    write_json(made.with_suffix(".json"), {"key": "of another text"})
    frontier(config)
    assert made.stat().st_mtime_ns != before
