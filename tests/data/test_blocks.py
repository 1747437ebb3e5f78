import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.data.blocks import (
    Blocks,
    Document,
    blocks_of_documents,
    count_heldout,
    pack_blocks,
    set_aside,
    split_documents,
)
from qat.data.config import TextConfig
from qat.data.text import begin_with

SEPARATOR, BOS = 999, 998


def document(length: int, start: int = 0, record: int = 0) -> Document:
    token_ids = np.arange(start, start + length, dtype=np.int32)
    return Document(token_ids, np.ones(length, dtype=bool), record)


def documents_of(lengths: list[int]) -> list[Document]:
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    return [
        document(length, start, record)
        for record, (length, start) in enumerate(zip(lengths, starts, strict=True))
    ]


@pytest.mark.recipe
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


@pytest.mark.recipe
@pytest.mark.parametrize("bos", [None, BOS])
@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=12), seq_len=st.integers(3, 9))
@settings(deadline=None)
def test_no_document_crosses_a_block_where_they_stay_whole(bos, lengths, seq_len):
    """All begin in a block that holds them, and count there; only the end of long ones is lost."""
    documents = documents_of(lengths)
    if bos is not None:
        documents = [begin_with(item, bos) for item in documents]
    blocks = pack_blocks(documents, seq_len, SEPARATOR, bos, is_whole=True)
    assert blocks.num_cut == sum(len(item.token_ids) >= seq_len for item in documents)
    for number, item in enumerate(documents):
        where = blocks.document_ids == number
        (row,) = where.any(dim=1).nonzero().flatten().tolist()
        kept = item.token_ids.tolist()[: seq_len - 1]
        found = blocks.token_ids[row][where[row]].tolist()
        assert found[: len(kept)] == kept
        assert set(found[len(kept) :]) == {SEPARATOR}
        counts = blocks.loss_mask[row][where[row]]
        first = 1 if bos is None else 2  # BOS is no label, nor is what comes after nothing
        assert counts[first : len(kept) + 1].all()
        assert not counts[len(kept) + 1 :].any()


@pytest.mark.recipe
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


def test_blocks_in_which_nothing_counts_are_dropped():
    """The first token of a block is never predicted, so alone it keeps no block."""
    item = document(8)
    item.is_counted[:] = False
    item.is_counted[4] = True
    assert len(pack_blocks([item], 4, SEPARATOR)) == 0
    item.is_counted[5] = True
    assert pack_blocks([item], 4, SEPARATOR).token_ids.tolist() == [[4, 5, 6, 7]]


@pytest.mark.recipe
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
    plan = TextConfig(seq_len=seq_len, heldout_ratio=ratio, num_sequences=limit, seed=seed)
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


@given(num_train=st.integers(0, 20), num_heldout=st.integers(0, 4), count=st.integers(0, 25))
@settings(deadline=None)
def test_blocks_set_aside_are_spread_and_none_is_held_out(num_train, num_heldout, count):
    """Both parts together are all blocks; at least one to train on stays."""
    ids = torch.arange(num_train + num_heldout, dtype=torch.int32)[:, None]
    kept, others = set_aside(Blocks(ids, ids > 0, ids, num_heldout), count)
    assert (
        sorted(torch.cat([kept.token_ids, others.token_ids]).flatten().tolist())
        == ids[:, 0].tolist()
    )
    assert kept.num_heldout == num_heldout
    assert kept.token_ids[len(kept) - num_heldout :].tolist() == ids[num_train:].tolist()
    assert len(others) == min(count, max(0, num_train - 1))
    gaps = kept.token_ids[: len(kept) - num_heldout].flatten().diff()
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_one_long_text_gives_its_end():
    """A data set of one document still has a held-out split."""
    blocks = blocks_of_documents([document(800)], SEPARATOR, TextConfig(seq_len=10))
    assert isinstance(blocks, Blocks)
    assert blocks.num_heldout == 10
    assert blocks.token_ids[-10:].min() == 700
