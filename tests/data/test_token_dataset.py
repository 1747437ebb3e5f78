import pickle
from itertools import islice

import numpy as np
import pytest
import torch

from qat.data import token_dataset, token_shards
from qat.data.token_dataset import TokenBlocks, TokenDataset, shuffled_indices
from qat.data.token_shards import DamagedShards, TokenManifest, write_manifest, write_shard
from tests.data.test_token_shards import IDENTITY


@pytest.fixture
def folder(tmp_path):
    """Three shards of documents whose tokens count on, so that any place is known by hand."""
    number, shards = 0, []
    for place, sizes in enumerate([(5, 3), (4, 9), (1, 2)]):
        train, heldout = [], []
        for size, side in [(sizes[0], train), (sizes[1], heldout), (6, train)]:
            side.append(np.arange(number, number + size))
            number += size
        path = tmp_path / f"tokens_{place}"
        shards.append(write_shard(path, train, heldout, vocab_size=99, source=place, num_records=3))
    manifest = TokenManifest(identity=IDENTITY, data_name="x", vocab_size=99, shards=tuple(shards))
    write_manifest(tmp_path, manifest)
    return tmp_path


TRAIN = [*range(5), *range(8, 14), *range(14, 18), *range(27, 33), 33, *range(36, 42)]
HELDOUT = [*range(5, 8), *range(18, 27), 34, 35]
STARTS = {0, 8, 14, 27, 33, 36, 5, 18, 34}


@pytest.mark.parametrize(("split", "row"), [("train", TRAIN), ("heldout", HELDOUT)])
@pytest.mark.parametrize("seq_len", [2, 3, 8])
def test_blocks_are_the_row_of_a_split(folder, split, row, seq_len):
    """They share a token with their neighbour: every token is predicted once, across shards."""
    blocks = TokenBlocks(TokenDataset.open(folder), split, seq_len)
    batch = blocks.batch(np.arange(len(blocks)))
    step = seq_len - 1
    expected = [row[start * step : start * step + seq_len] for start in range(len(blocks))]
    assert batch.token_ids.tolist() == expected
    assert len(row) - 1 - len(blocks) * step < step
    firsts = torch.tensor([[token in STARTS for token in block[1:]] for block in expected])
    assert torch.equal(batch.mask, ~firsts)
    assert torch.equal(batch.document_ids[:, 1:] != batch.document_ids[:, :-1], firsts)


def test_a_block_is_found_by_its_index(folder):
    """In any order, alone or with others; there is none beyond the last."""
    blocks = TokenBlocks(TokenDataset.open(folder), "train", 4)
    several = blocks.batch(np.array([5, 0, 3]))
    assert torch.equal(several.token_ids[0:1], blocks[5].token_ids)
    assert torch.equal(blocks[-1].token_ids, blocks[len(blocks) - 1].token_ids)
    with pytest.raises(IndexError):
        blocks[len(blocks)]
    with pytest.raises(IndexError, match="train has tokens 0..27"):
        blocks.batch(np.array([len(blocks) + 5]))
    with pytest.raises(ValueError, match="14 tokens in its heldout split, less than one block"):
        TokenBlocks(TokenDataset.open(folder), "heldout", 15)


def test_a_split_without_documents_is_refused(tmp_path):
    """Where nothing was held out, nothing can be measured."""
    shard = write_shard(tmp_path / "a", [np.arange(9)], [], vocab_size=9, source=0, num_records=1)
    manifest = TokenManifest(identity=IDENTITY, data_name="x", vocab_size=9, shards=(shard,))
    write_manifest(tmp_path, manifest)
    with pytest.raises(ValueError, match="0 tokens in its heldout split"):
        TokenBlocks(TokenDataset.open(tmp_path), "heldout", 4)


def test_damage_is_found_before_a_token_is_given(folder):
    """By size when the folder is opened, by sha256 when a shard is first read."""
    path = folder / "tokens_1"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    tokens = TokenDataset.open(folder)
    assert tokens.read("train", np.arange(11))[0].tolist() == TRAIN[:11]
    with pytest.raises(DamagedShards, match="tokens_1 has sha256"):
        tokens.read("train", np.array([11]))
    path.write_bytes(data[:-1])
    with pytest.raises(DamagedShards, match="tokens_1 has .* bytes"):
        TokenDataset.open(folder)


def test_shuffled_batches_follow_from_their_number():
    """Every epoch holds all items once, in another order; a start in the middle is the same row."""
    row = list(islice(shuffled_indices(10, 4, [3]), 5))
    assert sorted(np.concatenate(row)[:10]) == sorted(np.concatenate(row)[10:]) == list(range(10))
    assert np.concatenate(row)[:10].tolist() != np.concatenate(row)[10:].tolist()
    again = list(islice(shuffled_indices(10, 4, [3], start_batch=2), 3))
    assert np.array_equal(again, row[2:])
    assert not np.array_equal(row[0], next(shuffled_indices(10, 4, [4])))


@pytest.fixture
def small_windows(monkeypatch):
    """Chunks of 4 items, windows of 3 chunks."""
    monkeypatch.setattr(token_dataset, "CHUNK_ITEMS", 4)
    monkeypatch.setattr(token_dataset, "WINDOW_ITEMS", 12)


@pytest.mark.parametrize("num_items", [12, 13, 40, 47])
def test_an_epoch_in_windows_holds_all_items_once(small_windows, num_items):
    """From any batch on it is the same row; a window holds whole chunks from anywhere."""
    row = np.concatenate(list(islice(shuffled_indices(num_items, num_items, [3]), 4)))
    for epoch in (row[:num_items], row[num_items : 2 * num_items]):
        assert sorted(epoch) == list(range(num_items))
    for start in range(5):
        rest = np.concatenate(list(islice(shuffled_indices(num_items, 5, [3], start), 4)))
        assert rest.tolist() == row[start * 5 : start * 5 + 20].tolist()
    chunks = [len(set(row[first : first + 12] // 4)) for first in range(0, num_items - 11, 12)]
    assert set(chunks) == {3}
    if num_items == 47:
        assert max(row[:12]) - min(row[:12]) >= 12


def test_maps_make_room_and_shards_are_verified_once(folder, monkeypatch):
    """All places are read right with one map at a time; another process hashes nothing again."""
    hashed = []
    real = token_shards.sha256_of_file
    monkeypatch.setattr(token_shards, "sha256_of_file", lambda p: hashed.append(p) or real(p))
    monkeypatch.setattr(token_dataset, "MAPPED_BYTES", 1)
    for _ in range(2):
        tokens = TokenDataset.open(folder)
        for place in np.random.default_rng(0).permutation(len(TRAIN)):
            assert tokens.read("train", np.array([place]))[0].tolist() == [TRAIN[place]]
        assert len(tokens._shards) == 1
    assert sorted(path.name for path in hashed) == ["tokens_0", "tokens_1", "tokens_2"]
    path = folder / "tokens_1"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DamagedShards, match="tokens_1 has sha256"):
        TokenDataset.open(folder).read("train", np.array([11]))


def test_a_dataset_travels_without_its_maps(folder):
    """A process that reads batches maps the shards itself."""
    tokens = TokenDataset.open(folder)
    tokens.read("train", np.arange(28))
    copy = pickle.loads(pickle.dumps(tokens))
    assert len(tokens._shards) == 3
    assert not copy._shards
    assert copy.read("train", np.arange(28))[0].tolist() == TRAIN
