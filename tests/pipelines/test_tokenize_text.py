import json
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest

from qat.data.config import TokenizeConfig
from qat.data.text import tokenizer_sha256
from qat.data.token_dataset import TokenDataset
from qat.model.load import load_tokenizer
from qat.pipelines.tokenize_text import tokenize
from tests.tiny import tiny_tokenizer, write_jsonl

TEXTS = [f"{number} small birds near the old boat" for number in range(60)]


@pytest.fixture
def config(tmp_path):
    """A folder with a file of each form, and a tokenizer."""
    data = tmp_path / "data"
    (data / "more").mkdir(parents=True)
    records = [{"text": text} for text in TEXTS]
    write_jsonl(data / "a.jsonl", records[:20])
    table = pyarrow.table({"text": TEXTS[20:40], "url": [""] * 20})
    pyarrow.parquet.write_table(table, data / "b.parquet")
    (data / "c.json").write_text(json.dumps(records[40:59]))
    (data / "more" / "d.txt").write_text(TEXTS[59])
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return TokenizeConfig(
        data=str(data),
        tokenizer=str(tmp_path / "tokenizer"),
        output_dir=tmp_path / "shards",
        heldout_ratio=0.2,
        shard_tokens=300,
    )


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_form_of_file_becomes_shards_once(config):
    """In the order of the files; a second call finds them whole; other settings are refused."""
    result = tokenize(config)
    tokens = TokenDataset.open(config.output_dir)
    assert result.documents == len(TEXTS)
    assert result.heldout_tokens > 0
    assert [shard.source for shard in tokens.manifest.shards][-1] == 3
    stored = load_tokenizer(tokens.tokenizer_folder)
    assert tokenizer_sha256(stored) == tokens.manifest.identity.tokenizer_sha256
    before = contents(config.output_dir)
    assert not [path for path in before if path.name.startswith(("progress", "building"))]
    assert tokenize(config) == result
    assert contents(config.output_dir) == before
    with pytest.raises(ValueError, match="heldout_ratio 0.2, asked for is 0.1"):
        tokenize(replace(config, heldout_ratio=0.1))


def test_an_interrupted_command_ends_with_the_same_bytes(config, monkeypatch):
    """Stopped at the fourth shard; meanwhile other settings are refused."""
    from qat.data import token_writer

    tokenize(replace(config, output_dir=config.output_dir / "straight"))
    calls, write = [], token_writer.write_shard

    def stop(*args, **options):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return write(*args, **options)

    monkeypatch.setattr(token_writer, "write_shard", stop)
    config = replace(config, output_dir=config.output_dir / "stopped")
    with pytest.raises(KeyboardInterrupt):
        tokenize(config)
    assert not (config.output_dir / "manifest.json").exists()
    with pytest.raises(ValueError, match="shard_tokens 300, asked for is 7"):
        tokenize(replace(config, shard_tokens=7))
    tokenize(config)
    assert contents(config.output_dir) == contents(config.output_dir.parent / "straight")


@pytest.mark.recipe
def test_workers_change_no_byte(config):
    """Two processes, one file at a time each."""
    tokenize(config)
    other = replace(config, output_dir=config.output_dir.parent / "two", workers=2)
    tokenize(other)
    assert contents(other.output_dir) == contents(config.output_dir)


@pytest.mark.recipe
def test_a_folder_of_300_files_is_read_in_the_order_of_their_names(config, tmp_path):
    """Parquet with the text in a column of another name, in several processes as in one."""
    data = tmp_path / "many"
    data.mkdir()
    for number in range(300):
        table = pyarrow.table({"content": [f"file {number} of many boats"], "url": [""]})
        pyarrow.parquet.write_table(table, data / f"train-{number:05d}-of-00300.parquet")
    settings = {"data": str(data), "text_column": "content", "heldout_ratio": 0.1}
    alone = replace(config, output_dir=tmp_path / "alone", **settings)
    assert tokenize(alone).documents == 300
    tokens = TokenDataset.open(alone.output_dir)
    assert [shard.source for shard in tokens.manifest.shards][-1] == 299
    assert tokenize(replace(alone, output_dir=tmp_path / "four", workers=4)).documents == 300
    assert contents(tmp_path / "four") == contents(alone.output_dir)


def test_data_without_training_text_is_refused(config, tmp_path):
    """Empty texts make no shards."""
    empty = write_jsonl(tmp_path / "e.jsonl", [{"text": " "}, {"text": ""}])
    with pytest.raises(ValueError, match="gives no training tokens"):
        tokenize(replace(config, data=str(empty), output_dir=tmp_path / "none"))
