import random

import pytest
import torch

from qat.data.config import TextConfig
from qat.data.text import bos_id, read_blocks, read_documents, text_blocks, vocabulary_size
from tests.tiny import CHAT_TEMPLATE, tiny_records, tiny_tokenizer, with_bos, write_jsonl

BOS_ID = 256  # <|endoftext|> of the tiny tokenizer
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]


@pytest.mark.parametrize(
    ("records", "plan", "said"),
    [
        ([{"a": 1}], {}, "knows no format with the fields a"),
        ([{"text": "x"}], {"format": "alpaca"}, "sample 0"),
        ([{"messages": [{"role": "robot", "content": "x"}]}], {}, "robot"),
        ([{"text": "x"}], {"thinking": "true"}, "chat template"),
        ([{"text": "x"}], {}, "less than one block"),
        ([{"text": " "}], {}, "less than one block"),
    ],
)
def test_records_that_cannot_be_used_are_refused(tmp_path, records, plan, said):
    """The message holds the sample or flag at fault."""
    path = write_jsonl(tmp_path / "a.jsonl", records)
    with pytest.raises(ValueError, match=said):
        read_blocks(str(path), tiny_tokenizer(None), TextConfig(seq_len=64, **plan))


def test_the_tokenizer_tells_whether_texts_start_with_bos():
    """By what it does to a text: a `bos_token` that it never adds does not count."""
    assert bos_id(tiny_tokenizer()) is None
    unused = tiny_tokenizer()
    unused.bos_token = "<|im_start|>"
    assert bos_id(unused) is None
    assert bos_id(with_bos(tiny_tokenizer())) == BOS_ID


def test_documents_start_with_bos_once(tmp_path):
    """Templates that write it, as Gemma's, get no second one."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}, {"messages": TURNS}])
    tokenizer = with_bos(tiny_tokenizer("{{ '<|endoftext|>' }}" + CHAT_TEMPLATE))
    for thinking in ("none", "false"):
        plan = TextConfig(seq_len=8, thinking=thinking)
        for item in read_documents(str(path), tokenizer, plan):
            assert item.token_ids.tolist().count(BOS_ID) == 1
            assert item.token_ids[0] == BOS_ID


def test_a_limit_reads_no_more_than_it_needs(tmp_path):
    """The blocks of a limited read are those of the whole, and few records are looked at."""
    records = tiny_records(400)
    random.Random(0).shuffle(records)
    path = write_jsonl(tmp_path / "a.jsonl", [*records, {"broken": 1}])
    plan = TextConfig(seq_len=16, num_sequences=10, heldout_ratio=0, format="alpaca")
    blocks = read_blocks(str(path), tiny_tokenizer(), plan)
    assert len(blocks) == 10


def test_text_blocks_are_the_text(tmp_path):
    """Decoded and joined, they are the file's beginning; a limit changes none of them."""
    text = "Two small birds near the old boat.\n" * 20
    path = tmp_path / "a.txt"
    path.write_text(text)
    tokenizer = tiny_tokenizer()
    blocks = text_blocks(path, tokenizer, 16)
    assert blocks.dtype == torch.int64
    assert text.startswith(tokenizer.decode(blocks.flatten()))
    assert len(blocks) == len(text) // 16
    assert torch.equal(text_blocks(path, tokenizer, 16, limit=3), blocks[:3])
    with pytest.raises(ValueError, match="less than one block"):
        text_blocks(path, tokenizer, 10_000)


def test_text_blocks_start_with_bos_where_the_model_expects_it(tmp_path):
    """It takes a place of each block; the text continues from block to block without a gap."""
    text = "Two small birds near the old boat.\n" * 20
    path = tmp_path / "a.txt"
    path.write_text(text)
    tokenizer = with_bos(tiny_tokenizer())
    blocks = text_blocks(path, tokenizer, 16)
    assert (blocks[:, 0] == BOS_ID).all()
    assert len(blocks) == len(text) // 15
    assert text.startswith(tokenizer.decode(blocks[:, 1:].flatten()))


def test_ids_with_gaps_between_them_fit_the_vocabulary():
    """A tokenizer may have fewer tokens than its largest id tells."""
    tokenizer = tiny_tokenizer()
    assert vocabulary_size(tokenizer) == len(tokenizer)
    tokenizer.get_vocab = lambda: {"a": 0, "b": 70_000}
    assert vocabulary_size(tokenizer) == 70_001
