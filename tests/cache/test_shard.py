import numpy as np
import pytest
import torch

from qat.cache import shard
from qat.cache.manifest import CacheMismatch


@pytest.mark.parametrize(("num_sequences", "seq_len"), [(1, 64), (600, 64), (3, 20_000)])
def test_ranges_are_a_partition(num_sequences, seq_len):
    """Every sequence is in one shard, in order, and all shards but the last are full."""
    ranges = shard.shard_ranges(num_sequences, seq_len)
    assert torch.cat(list(ranges.values())).tolist() == list(range(num_sequences))
    full = shard.sequences_a_shard(seq_len)
    assert all(len(rows) == full for rows in list(ranges.values())[:-1])
    assert list(ranges) == list(range(len(ranges)))


@pytest.mark.parametrize("vocab_size", [2**16, 2**16 + 1])
def test_fields_come_back(tmp_path, vocab_size):
    """Ids in the smallest dtype that holds them, other fields to the bit."""
    ids = shard.id_dtype(vocab_size)
    fields = {"token_ids": torch.tensor([[0, vocab_size - 1]]), "log_probs": torch.rand(1, 2)}
    entry = shard.write_fields(tmp_path / "s", fields, ids=ids, num_sequences=1)
    found = shard.read_fields(tmp_path / "s")
    assert found["token_ids"].numpy().dtype == np.dtype(ids)
    assert found["token_ids"].int().tolist() == fields["token_ids"].tolist()
    assert torch.equal(found["log_probs"], fields["log_probs"])
    assert shard.entry_of_file(tmp_path / "s", 1) == entry


def test_an_altered_file_is_refused(tmp_path):
    """By its size at once, by its checksum when it is read."""
    fields = {"hidden": torch.zeros(2, 8, dtype=torch.int8)}
    entry = shard.write_fields(tmp_path / "s", fields, ids=np.uint16, num_sequences=2)
    shard.check_size(tmp_path, entry)
    shard.check_sha256(tmp_path, entry)
    written = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(written[:-1] + b"x")
    with pytest.raises(CacheMismatch, match="has sha256"):
        shard.check_sha256(tmp_path, entry)
    (tmp_path / "s").write_bytes(written[:-1])
    with pytest.raises(CacheMismatch, match=f"has {len(written) - 1} bytes"):
        shard.check_size(tmp_path, entry)
