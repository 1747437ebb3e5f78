from dataclasses import replace

import pytest

from qat.data.config import TrainTokenizerConfig
from qat.model.load import load_tokenizer
from qat.pipelines.train_tokenizer import train_tokenizer
from tests.tiny import tiny_records, write_jsonl


def test_a_tokenizer_is_learned_once(tmp_path):
    """The second call finds it, and other settings are refused in the same folder."""
    data = write_jsonl(tmp_path / "a.jsonl", tiny_records())
    config = TrainTokenizerConfig(
        data=str(data), output=tmp_path / "made", vocab_size=290, kind="byte-level-bpe"
    )
    first = train_tokenizer(config)
    written = (config.output / "tokenizer.json").stat().st_mtime_ns
    assert train_tokenizer(config) == first
    assert (config.output / "tokenizer.json").stat().st_mtime_ns == written
    assert len(load_tokenizer(first.tokenizer)) == first.tokens == 290
    with pytest.raises(ValueError, match="exists with vocab_size 290, asked for is 280"):
        train_tokenizer(replace(config, vocab_size=280))
