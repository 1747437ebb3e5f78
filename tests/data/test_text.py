import random
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.data.text import (
    Blocks,
    Document,
    TextPlan,
    begin_with,
    blocks_of_documents,
    bos_id,
    count_heldout,
    detect_format,
    ignores_thinking,
    pack_blocks,
    read_blocks,
    read_documents,
    render,
    split_documents,
    text_blocks,
    turns_of,
)
from tests.tiny import CHAT_TEMPLATE, tiny_records, tiny_tokenizer, with_bos, write_jsonl

SEPARATOR, BOS = 999, 998
BOS_ID = 256  # <|endoftext|> of the tiny tokenizer
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
# As Qwen3's: earlier turns lose their thoughts, the last one gets an empty span.
REWRITING_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.last and message['role'] == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def document(length: int, start: int = 0, record: int = 0) -> Document:
    token_ids = np.arange(start, start + length, dtype=np.int32)
    return Document(token_ids, np.ones(length, dtype=bool), record)


def documents_of(lengths: list[int]) -> list[Document]:
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    return [
        document(length, start, record)
        for record, (length, start) in enumerate(zip(lengths, starts, strict=True))
    ]


# Formats and rendering.


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Yes."}),
        ("dolly", {"instruction": "Hi", "context": "", "response": "Yes."}),
        ("messages", {"messages": TURNS}),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                    TURNS[1],
                ]
            },
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]},
        ),
    ],
)
def test_every_format_is_found_and_gives_the_same_turns(kind, record):
    """One conversation written in each format is one conversation."""
    assert detect_format(record) == kind
    assert turns_of(record, kind) == TURNS


def test_alpaca_puts_the_input_after_a_blank_line():
    """The seeds' user turn: instruction, blank line, input."""
    record = {"instruction": "Add.", "input": "2 2", "output": "4"}
    assert turns_of(record, "alpaca")[0]["content"] == "Add.\n\n2 2"


def test_none_joins_contents_by_blank_lines():
    """thinking=none uses no template."""
    assert render(TURNS, tiny_tokenizer(None), "none") == "Hi\n\nYes."


def test_thinking_modes_render_as_the_seeds_do(tmp_path):
    """both is off then on; all is on, off, then without a template; off has no think span."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}])
    tokenizer = tiny_tokenizer(REWRITING_TEMPLATE)

    def texts(thinking):
        plan = TextPlan(seq_len=8, thinking=thinking)
        return [
            tokenizer.decode(item.token_ids) for item in read_documents(str(path), tokenizer, plan)
        ]

    off, on, plain = texts("false")[0], texts("true")[0], texts("none")[0]
    assert "<think>" in on
    assert "<think>" not in off
    assert plain == "Hi\n\nYes."
    assert texts("both") == [off, on]
    assert texts("all") == [on, off, plain]


def test_a_template_that_ignores_thinking_is_known_and_renders_once(tmp_path):
    """Two equal texts would only weigh a record twice."""
    plain = tiny_tokenizer(CHAT_TEMPLATE.replace("enable_thinking is false", "false"))
    assert ignores_thinking(plain)
    assert not ignores_thinking(tiny_tokenizer(REWRITING_TEMPLATE))
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}])
    plan = TextPlan(seq_len=8, thinking="both")
    assert len(list(read_documents(str(path), plain, plan))) == 1


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, REWRITING_TEMPLATE, None])
@pytest.mark.parametrize("thinking", ["none", "false", "true"])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_assistant_loss_counts_what_the_assistant_says(tmp_path_factory, template, thinking, data):
    """The counted tokens of a conversation hold every answer, and no question."""
    if template is None and thinking != "none":
        return
    words = st.text("abc ", min_size=1, max_size=6).filter(str.strip)
    answers = data.draw(st.lists(words, min_size=1, max_size=3))
    turns = []
    for answer in answers:
        turns += [{"role": "user", "content": "QQ"}, {"role": "assistant", "content": answer}]
    path = write_jsonl(tmp_path_factory.mktemp("data") / "a.jsonl", [{"messages": turns}])
    tokenizer = tiny_tokenizer(template)
    plan = TextPlan(seq_len=8, thinking=thinking, loss_on="assistant")
    (item,) = read_documents(str(path), tokenizer, plan)
    counted = tokenizer.decode(item.token_ids[item.is_counted])
    spoken = re.sub(r"<think>.*?</think>\s*|<\|im_end\|>|\n", "", counted, flags=re.DOTALL)
    assert spoken.replace(" ", "") == "".join(answers).replace(" ", "")


def test_thoughts_that_a_template_drops_do_not_hide_the_answer(tmp_path):
    """Without thinking, an answer with thoughts counts from behind them."""
    answer = {"role": "assistant", "content": "<think>Hm.</think>Yes."}
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [TURNS[0], answer]}])
    tokenizer = tiny_tokenizer()
    plan = TextPlan(seq_len=8, thinking="false", loss_on="assistant")
    (item,) = read_documents(str(path), tokenizer, plan)
    counted = tokenizer.decode(item.token_ids[item.is_counted])
    assert counted == "Yes.<|im_end|>\n"


def test_the_end_of_an_answer_counts_with_it(tmp_path):
    """A student must learn to stop: the turn's end token is the assistant's."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}])
    tokenizer = tiny_tokenizer()
    plan = TextPlan(seq_len=8, thinking="true", loss_on="assistant")
    (item,) = read_documents(str(path), tokenizer, plan)
    assert "Yes.<|im_end|>" in tokenizer.decode(item.token_ids[item.is_counted])


def test_a_sample_without_counted_tokens_is_refused_with_its_index(tmp_path):
    """The index says which sample to correct."""
    records = [{"messages": TURNS}, {"messages": TURNS[:1]}]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    plan = TextPlan(seq_len=8, loss_on="assistant")
    with pytest.raises(ValueError, match="sample 1 "):
        list(read_documents(str(path), tiny_tokenizer(), plan))


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
        read_blocks(str(path), tiny_tokenizer(None), TextPlan(seq_len=64, **plan))


# Packing and splitting.


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), seq_len=st.integers(3, 7))
@settings(deadline=None)
def test_packing_loses_only_the_last_partial_block(lengths, seq_len):
    """Blocks read in a row are the documents in a row, one separator after each."""
    documents = documents_of(lengths)
    stream = []
    for number, item in enumerate(documents):
        stream += [(token, number) for token in [*item.token_ids.tolist(), SEPARATOR]]
    blocks = pack_blocks(documents, seq_len, SEPARATOR)
    kept = stream[: len(stream) // seq_len * seq_len]
    assert blocks.token_ids.shape == (len(stream) // seq_len, seq_len)
    assert blocks.token_ids.flatten().tolist() == [token for token, _ in kept]
    assert blocks.document_ids.flatten().tolist() == [number for _, number in kept]
    numbers = [number for _, number in stream]
    counts = [index > 0 and numbers[index - 1] == number for index, number in enumerate(numbers)]
    assert blocks.loss_mask.flatten().tolist() == counts[: len(kept)]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), seq_len=st.integers(3, 7))
@settings(deadline=None)
def test_each_block_starts_with_bos_and_none_is_a_label(lengths, seq_len):
    """Without the added ones, blocks in a row are the documents in a row, each after its own."""
    documents = [begin_with(item, BOS) for item in documents_of(lengths)]
    stream = [token for item in documents for token in [*item.token_ids.tolist(), SEPARATOR]]
    blocks = pack_blocks(documents, seq_len, SEPARATOR, BOS)
    assert (blocks.token_ids[:, 0] == BOS).all()
    is_label = blocks.loss_mask[:, 1:]
    assert not (is_label & (blocks.token_ids[:, 1:] == BOS)).any()
    assert (is_label | (blocks.token_ids[:, 1:] == BOS)).all()
    packed = [token for token in blocks.token_ids.flatten().tolist() if token != BOS]
    kept = [token for token in stream if token != BOS][: len(packed)]
    assert packed == kept
    assert len(stream) - stream.count(BOS) - len(packed) < seq_len
    is_start = blocks.document_ids.diff(dim=1) != 0
    assert torch.equal(is_start, blocks.token_ids[:, 1:] == BOS)


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
        plan = TextPlan(seq_len=8, thinking=thinking)
        for item in read_documents(str(path), tokenizer, plan):
            assert item.token_ids.tolist().count(BOS_ID) == 1
            assert item.token_ids[0] == BOS_ID


def test_blocks_in_which_nothing_counts_are_dropped():
    """The first token of a block is never predicted, so alone it keeps no block."""
    item = document(8)
    item.is_counted[:] = False
    item.is_counted[4] = True
    assert len(pack_blocks([item], 4, SEPARATOR)) == 0
    item.is_counted[5] = True
    assert pack_blocks([item], 4, SEPARATOR).token_ids.tolist() == [[4, 5, 6, 7]]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    seq_len=st.integers(3, 8),
    ratio=st.sampled_from([0.0, 0.125, 0.5]),
    limit=st.none() | st.integers(1, 20),
    seed=st.integers(0, 3),
)
@settings(deadline=None)
def test_no_token_is_both_trained_on_and_held_out(lengths, seq_len, ratio, limit, seed):
    """The split holds, its size is the asked one, and the limit is for both sides together."""
    plan = TextPlan(seq_len=seq_len, heldout_ratio=ratio, num_sequences=limit, seed=seed)
    documents = documents_of(lengths)
    try:
        blocks = blocks_of_documents(documents, SEPARATOR, plan)
    except ValueError:
        assert sum(lengths) + len(lengths) < seq_len
        return
    num_train = len(blocks) - blocks.num_heldout
    train = set(blocks.token_ids[:num_train].flatten().tolist()) - {SEPARATOR}
    heldout = set(blocks.token_ids[num_train:].flatten().tolist()) - {SEPARATOR}
    assert not train & heldout
    assert limit is None or len(blocks) <= limit
    total = min((sum(lengths) + len(lengths)) // seq_len, limit or 10**9)
    assert blocks.num_heldout == count_heldout(total, ratio)
    # Lost are two partial blocks, and by how much the last held-out record overshoots.
    assert len(blocks) >= total - 2 - blocks.num_heldout / 2
    same = blocks_of_documents(documents, SEPARATOR, plan)
    assert torch.equal(same.token_ids, blocks.token_ids)


@given(seed=st.integers(0, 20))
@settings(deadline=None)
def test_renderings_of_a_record_stay_on_one_side(seed):
    """A conversation rendered twice must not be seen in training and asked for in the end."""
    documents = [
        document(10, 10 * index, record) for index, record in enumerate([0, 0, 1, 1, 2, 2])
    ]
    train, heldout = split_documents(documents, 20, seed)
    assert {item.record for item in train} & {item.record for item in heldout} == set()
    assert len(heldout) == 2


def test_one_long_text_gives_its_end():
    """A data set of one document still has a held-out split."""
    blocks = blocks_of_documents([document(800)], SEPARATOR, TextPlan(seq_len=10))
    assert isinstance(blocks, Blocks)
    assert blocks.num_heldout == 10
    assert blocks.token_ids[-10:].min() == 700


def test_a_limit_reads_no_more_than_it_needs(tmp_path):
    """The blocks of a limited read are those of the whole, and few records are looked at."""
    records = tiny_records(400)
    random.Random(0).shuffle(records)
    path = write_jsonl(tmp_path / "a.jsonl", [*records, {"broken": 1}])
    plan = TextPlan(seq_len=16, num_sequences=10, heldout_ratio=0, format="alpaca")
    blocks = read_blocks(str(path), tiny_tokenizer(), plan)
    assert len(blocks) == 10


# Plain text.


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
    """It takes a place of each block; the text goes on from block to block without a gap."""
    text = "Two small birds near the old boat.\n" * 20
    path = tmp_path / "a.txt"
    path.write_text(text)
    tokenizer = with_bos(tiny_tokenizer())
    blocks = text_blocks(path, tokenizer, 16)
    assert (blocks[:, 0] == BOS_ID).all()
    assert len(blocks) == len(text) // 15
    assert text.startswith(tokenizer.decode(blocks[:, 1:].flatten()))
