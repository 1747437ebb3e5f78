"""A look at sizes in memory, against the files that the same settings make."""

import pytest

from qat.pipelines.compress import compress
from qat.pipelines.compress_config import CompressConfig
from qat.pipelines.frontier import frontier
from tests.pipelines.test_frontier import config_of
from tests.tiny import save_tiny, tiny_llama, tiny_records, write_jsonl


@pytest.mark.recipe
def test_a_quick_look_ranks_sizes_alike_and_writes_no_file(tmp_path):
    """Its bytes are those of the files that a fit by moments would make."""
    save_tiny(tmp_path / "model", tiny_llama())
    write_jsonl(tmp_path / "data.jsonl", tiny_records(120))
    quick = frontier(config_of(tmp_path, fit="moments"))
    assert not (tmp_path / "report" / "files").exists()
    assert quick.rank_correlation == pytest.approx(1)
    assert "of fits in memory" in quick.markdown.read_text()
    (size, *_) = quick.points
    made = compress(
        CompressConfig(
            model=str(tmp_path / "model"),
            data=str(tmp_path / "data.jsonl"),
            output=tmp_path / "a.gguf",
            size="60KB",
            work=tmp_path / "report" / "work",
            **{"minutes": 0, "num_sequences": 64, "seq_len": 32, "fit": "moments"},
            dtype="fp32",
            device="cpu",
        )
    )
    assert made.file_bytes == size["file_bytes"]
    assert made.kl_nats == pytest.approx(size["kl_nats"], rel=1e-4)
