import hashlib
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import save

from qat.data.token_shards import (
    DamagedShards,
    TokenIdentity,
    TokenManifest,
    is_heldout,
    map_shard,
    read_identity,
    read_manifest,
    require_identity,
    write_manifest,
    write_shard,
)
from qat.storage.files import read_json, write_json
from qat.storage.receipt import Verified

VOCAB = 9
IDENTITY = TokenIdentity(
    tokenizer_sha256="t",
    data=("a", "b"),
    text_column="text",
    heldout_ratio=0.5,
    shard_tokens=8,
    bos_id=None,
    separator_id=2,
)


@pytest.mark.parametrize(("vocab_size", "width"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_documents_come_back_as_they_went_in(tmp_path, vocab_size, width):
    """Training documents first; ids are as narrow as the vocabulary lets them be."""
    train = [np.array([5, vocab_size - 1, 2]), np.array([7, 2])]
    heldout = [np.array([9, 9, 9, 2])]
    shard = write_shard(
        tmp_path / "a", train, heldout, vocab_size=vocab_size, source=0, num_records=4
    )
    ids, ends = map_shard(tmp_path, shard, vocab_size, Verified(tmp_path))
    assert ids.astype(int).tolist() == [5, vocab_size - 1, 2, 7, 2, 9, 9, 9, 2]
    assert ids.itemsize == width
    assert ends.tolist() == [3, 5, 9]
    assert (shard.num_tokens, shard.num_heldout_tokens, shard.num_documents) == (5, 4, 3)


def test_a_damaged_shard_is_refused(tmp_path):
    """A changed byte by its sha256, a cut file by its size; both name the file."""
    shard = write_shard(tmp_path / "a", [np.arange(9)], [], vocab_size=9, source=0, num_records=1)
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(data[:-1] + b"\x07")
    with pytest.raises(DamagedShards, match="a has sha256 .* run `qat tokenize` again"):
        map_shard(tmp_path, shard, VOCAB, Verified(tmp_path))
    (tmp_path / "a").write_bytes(data[:-1])
    with pytest.raises(DamagedShards, match=f"a has {len(data) - 1} bytes"):
        map_shard(tmp_path, shard, VOCAB, Verified(tmp_path))


def test_a_shard_of_other_tokens_than_the_manifest_says_is_refused(tmp_path):
    """Also where its bytes are those that the manifest names."""
    shard = write_shard(tmp_path / "a", [np.arange(9)], [], vocab_size=9, source=0, num_records=1)
    for changes in ({"num_tokens": 8}, {"num_documents": 2}):
        with pytest.raises(DamagedShards, match="a holds other tokens than the manifest says"):
            map_shard(tmp_path, replace(shard, **changes), VOCAB, Verified(tmp_path))
    with pytest.raises(DamagedShards, match="a holds ids or documents that cannot be"):
        map_shard(tmp_path, shard, VOCAB - 1, Verified(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": torch.zeros(0, dtype=torch.uint16), "document_ends": torch.tensor([0])},
        {"token_ids": torch.zeros(9, dtype=torch.bfloat16)},
        {"document_ends": torch.tensor([9.0])},
    ],
)
def test_a_shard_of_other_fields_is_refused(tmp_path, changes):
    """No tokens, or numbers that are no ids, ended in a traceback although the sha256 fitted."""
    fields = {"token_ids": torch.arange(9).to(torch.uint16), "document_ends": torch.tensor([9])}
    data = save(fields := {**fields, **changes})
    (tmp_path / "a").write_bytes(data)
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)}
    entry["num_tokens"] = len(fields["token_ids"])
    shard = write_shard(tmp_path / "b", [np.arange(9)], [], vocab_size=9, source=0, num_records=1)
    with pytest.raises(DamagedShards, match="a (holds|has) .* run `qat tokenize` again"):
        map_shard(tmp_path, replace(shard, file="a", **entry), VOCAB, Verified(tmp_path))


def test_a_manifest_comes_back_and_an_altered_one_is_refused(tmp_path):
    """Nothing is whole before the manifest is there."""
    with pytest.raises(FileNotFoundError, match="`qat tokenize`"):
        read_manifest(tmp_path)
    shard = write_shard(tmp_path / "a", [np.arange(9)], [], vocab_size=9, source=0, num_records=1)
    manifest = TokenManifest(identity=IDENTITY, data_name="x", vocab_size=9, shards=(shard,))
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    values = read_json(tmp_path / "manifest.json")
    values["identity"]["heldout_ratio"] = 0.25
    write_json(tmp_path / "manifest.json", values)
    with pytest.raises(DamagedShards, match="fingerprint"):
        read_manifest(tmp_path)
    write_json(tmp_path / "manifest.json", {"fingerprint": "x"})
    with pytest.raises(DamagedShards, match="identity is missing"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, replace(manifest, shards=()))
    with pytest.raises(DamagedShards, match="shards is empty"):
        read_manifest(tmp_path)


def test_other_shards_are_refused_by_what_differs(tmp_path):
    """The first field that is another is named with both values."""
    write_json(tmp_path / "building.json", asdict(IDENTITY))
    assert read_identity(tmp_path / "building.json") == IDENTITY
    require_identity(IDENTITY, IDENTITY, tmp_path)
    other = replace(IDENTITY, text_column="body")
    with pytest.raises(ValueError, match="with text_column text, asked for is body"):
        require_identity(IDENTITY, other, tmp_path)


def test_a_hash_of_the_text_holds_documents_out():
    """About the share that is asked for, none for 0; a larger share keeps those of a smaller."""
    texts = [f"document {number}" for number in range(2000)]
    some = {text for text in texts if is_heldout(text, 0.1)}
    assert 150 < len(some) < 250
    assert some < {text for text in texts if is_heldout(text, 0.2)}
    assert not any(is_heldout(text, 0.0) for text in texts)
