from dataclasses import replace
from itertools import chain

import pytest

from qat.data.token_shards import TokenIdentity, map_shard
from qat.data.token_writer import Source, tokenize_source
from qat.storage.files import read_json, write_json
from qat.storage.receipt import Verified
from tests.tiny import tiny_tokenizer, with_bos, write_jsonl

TEXTS = [*(f"word {number} of a text" * (number % 5) for number in range(40)), "last"]
END = 258


@pytest.fixture
def source(tmp_path):
    """A file of documents, some of them empty, that gives several shards."""
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    identity = TokenIdentity(
        tokenizer_sha256="",
        data=("",),
        text_column="text",
        heldout_ratio=0.3,
        shard_tokens=400,
        bos_id=None,
        separator_id=END,
    )
    folder = tmp_path / "made"
    folder.mkdir()
    return Source(name=str(tmp_path / "a.jsonl"), index=3, folder=folder, identity=identity)


def documents_of(source, shards):
    """Return the texts of all documents, by hand."""
    found = []
    for shard in shards:
        ids, ends = map_shard(source.folder, shard, 261, Verified(source.folder))
        starts = [0, *ends[:-1]]
        found += [ids[a:b].tolist() for a, b in zip(starts, ends, strict=True)]
    return found


def test_every_document_is_there_once(source):
    """Tokens, then EOS; empty texts are none; records are counted with them."""
    shards = tokenize_source(source, tiny_tokenizer())
    found = documents_of(source, shards)
    assert all(ids.count(END) == 1 and ids[-1] == END for ids in found)
    texts = [tiny_tokenizer().decode(ids[:-1]) for ids in found]
    assert sorted(texts) == sorted(text for text in TEXTS if text)
    assert len(shards) > 3
    assert sum(shard.num_records for shard in shards) == len(TEXTS)
    assert all(shard.num_tokens + shard.num_heldout_tokens >= 400 for shard in shards[:-1])
    assert sum(shard.num_heldout_tokens for shard in shards) > 0


def test_documents_begin_with_bos_where_the_tokenizer_puts_it(source):
    """Every one of them."""
    tokenizer = with_bos(tiny_tokenizer())
    source = replace(source, identity=replace(source.identity, bos_id=tokenizer.bos_token_id))
    found = documents_of(source, tokenize_source(source, tokenizer))
    assert {ids[0] for ids in found} == {tokenizer.bos_token_id}


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_restart_writes_the_rest_byte_for_byte(source, kept):
    """After a kill between two shards, or in the middle of one that was not written down."""
    shards = tokenize_source(source, tiny_tokenizer())
    before = {path.name: path.read_bytes() for path in source.folder.iterdir()}
    values = read_json(source.progress_file)
    write_json(source.progress_file, {"complete": False, "shards": values["shards"][:kept]})
    for shard in shards[kept + 1 :]:
        (source.folder / shard.file).unlink()
    (source.folder / shards[kept].file).write_bytes(b"half")
    assert tokenize_source(source, tiny_tokenizer()) == shards
    assert {path.name: path.read_bytes() for path in source.folder.iterdir()} == before


def test_a_shard_that_was_damaged_meanwhile_is_made_again(source):
    """With all that follow it."""
    shards = tokenize_source(source, tiny_tokenizer())
    path = source.folder / shards[1].file
    data = path.read_bytes()
    path.write_bytes(bytes(chain(data[:-1], [data[-1] ^ 1])))
    assert tokenize_source(source, tiny_tokenizer()) == shards
    assert path.read_bytes() == data
