"""The curve of many sizes, next to files of other programs."""

import json

import pytest

from qat.export.to_gguf import export_to_gguf
from qat.pipelines.compress_config import FrontierConfig
from qat.pipelines.frontier import frontier
from tests.tiny import moved_student, save_tiny, tiny_llama, tiny_records, write_jsonl


def config_of(folder, **changes):
    """Return settings that take seconds."""
    settings = {"sizes": "60KB,90KB,75KB", "minutes": 0, "num_sequences": 64, "seq_len": 32}
    return FrontierConfig(
        model=str(folder / "model"),
        data=str(folder / "data.jsonl"),
        output=folder / "report",
        dtype="fp32",
        device="cpu",
        **{**settings, **changes},
    )


@pytest.mark.recipe
def test_a_frontier_falls_and_names_its_peers(tmp_path):
    """More bytes, less KL; predictions rank alike; a peer is measured and told what it holds."""
    save_tiny(tmp_path / "model", tiny_llama())
    write_jsonl(tmp_path / "data.jsonl", tiny_records(120))
    peer = tmp_path / "peers" / "a-Q4_0.gguf"
    export_to_gguf(moved_student(plan="deploy"), peer, text_source=tmp_path / "model")
    (tmp_path / "peers" / "odd.gguf").write_bytes(b"GGUF of a program that is not known")
    result = frontier(config_of(tmp_path, peers=tmp_path / "peers"))
    fits = [point for point in result.points if point["series"] == "fit"]
    assert [point["file_bytes"] for point in fits] == sorted(p["file_bytes"] for p in fits)
    assert [p["kl_nats"] for p in fits] == sorted((p["kl_nats"] for p in fits), reverse=True)
    assert all(p["file_bytes"] <= s for p, s in zip(fits, (60_000, 75_000, 90_000), strict=True))
    assert result.rank_correlation == pytest.approx(1)
    (peer,) = [point for point in result.points if point["series"] == "peers"]
    assert "Q2_0" in peer["note"]
    assert peer["kl_nats"] > 0
    for path in (result.markdown, result.plot, result.page):
        assert path.stat().st_size > 500
    assert frontier(config_of(tmp_path, peers=tmp_path / "peers")).points == result.points
    json.dumps(result.points)


def test_sizes_and_peers_are_checked_first(tmp_path):
    """A size that is none, and a folder without files, are refused before any work."""
    save_tiny(tmp_path / "model", tiny_llama())
    with pytest.raises(ValueError, match="size 'big' is none"):
        config_of(tmp_path, sizes="60KB,big")
    (tmp_path / "peers").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.gguf file"):
        frontier(config_of(tmp_path, peers=tmp_path / "peers"))
