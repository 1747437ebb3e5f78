import hashlib
import itertools
import json

import numpy as np
import pytest
import torch

from qat.cache import read, shard
from qat.cache.build import rewrite_cache
from qat.cache.manifest import ADDED_FIELDS, CacheMismatch
from qat.cache.read import TeacherCache, shuffled_batches
from tests.tiny import VOCAB_SIZE, tiny_cache, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "TOKENS_A_SHARD", 16 * 16)
        return tiny_cache(tmp_path_factory.mktemp("cache"), thinking="both")


@pytest.fixture
def copy(folder, tmp_path):
    """The cache, to be damaged."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_any_order_gives_the_same_sequences(folder):
    """Random access across shards equals the cache read in order."""
    cache = TeacherCache.open(folder)
    assert len(cache.manifest.shards) > 2
    order = np.random.default_rng(0).permutation(cache.num_sequences)
    whole, mixed = cache.batch(cache.sequence_ids()), cache.batch(order)
    assert torch.equal(whole.input_ids[order], mixed.input_ids)
    assert torch.equal(whole.signal.log_probs[order], mixed.signal.log_probs)
    assert torch.equal(whole.signal.token_ids[order], mixed.signal.token_ids)


def test_splits_part_the_cache(folder):
    """Train and held-out together are all, and share no sequence and no document."""
    cache = TeacherCache.open(folder)
    train, heldout = cache.sequence_ids("train"), cache.sequence_ids("heldout")
    assert np.array_equal(np.concatenate([train, heldout]), cache.sequence_ids())
    assert len(heldout) == round(cache.num_sequences / 8)
    documents = [set(cache.batch(ids).document_ids.flatten().tolist()) for ids in (train, heldout)]
    assert not documents[0] & documents[1]


@pytest.mark.parametrize("count", [1, 7, 10, 10_000])
def test_some_training_sequences_are_spread_over_all(folder, count):
    """Each once, in order, at even distances; all where there are no more."""
    cache = TeacherCache.open(folder)
    train = cache.sequence_ids("train")
    chosen = cache.spread_ids(count)
    assert len(chosen) == min(count, len(train))
    assert chosen[0] == train[0]
    assert set(chosen) <= set(train)
    gaps = np.diff([*chosen, train[-1] + 1])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def blocks_in(token_ids):
    """Return blocks as a set."""
    return {tuple(block) for block in token_ids.tolist()}


@pytest.mark.recipe
@pytest.mark.parametrize("count", [1, 9, 30, 10_000])
def test_text_is_what_is_trained_on_and_what_the_teacher_did_not_read(tmp_path, count):
    """None of it is held out; what the teacher reads is the share of it that was asked for."""
    plain = TeacherCache.open(tiny_cache(tmp_path / "plain", num_sequences=60))
    mixed = tiny_cache(tmp_path / "mixed", num_sequences=24, text_sequences=36)
    cache = TeacherCache.open(mixed)
    assert (cache.num_sequences, cache.num_text, plain.num_text) == (24, 57, 52)
    ids, documents = cache.spread_text(count)
    assert ids.shape == documents.shape == (min(count, 57), 16)
    heldout = blocks_in(cache.batch(cache.sequence_ids("heldout")).input_ids)
    assert not blocks_in(ids) & heldout
    if count > 57:
        read = blocks_in(cache.batch(cache.sequence_ids("train")).input_ids)
        assert read < blocks_in(ids)
    every, _ = plain.spread_text(10_000)
    assert torch.equal(every, plain.batch(plain.sequence_ids("train")).input_ids)


@pytest.mark.recipe
def test_the_teacher_may_have_read_all_there_is(tmp_path):
    """Further text that was asked for and is not there is a file of no sequences."""
    cache = TeacherCache.open(tiny_cache(tmp_path, num_sequences=10_000, text_sequences=5))
    assert cache.manifest.text.num_sequences == 0
    every = cache.batch(cache.sequence_ids("train")).input_ids
    assert torch.equal(cache.spread_text(10_000)[0], every)


def test_text_that_was_changed_is_refused(tmp_path):
    """Also where the length is the same."""
    folder = tiny_cache(tmp_path, num_sequences=24, text_sequences=16)
    path = folder / "text.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheMismatch, match="sha256"):
        TeacherCache.open(folder).spread_text(30)
    path.write_bytes(data[:-1])
    with pytest.raises(CacheMismatch, match="text.safetensors has"):
        TeacherCache.open(folder)


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_batches_resume_anywhere(folder, batch_size):
    """Batch b is the same whether reached from the start or asked for."""
    cache = TeacherCache.open(folder)
    options = {"batch_size": batch_size, "seed": 3}
    straight = list(itertools.islice(shuffled_batches(cache, **options), 12))
    for start in (0, 1, 5, 11):
        resumed = next(shuffled_batches(cache, **options, start_batch=start))
        assert torch.equal(resumed.input_ids, straight[start].input_ids)


def test_an_epoch_sees_every_training_sequence_once(folder):
    """Each epoch in an order of its own, and nothing that is held out."""
    cache = TeacherCache.open(folder)
    expected = cache.batch(cache.sequence_ids("train")).input_ids
    count = len(expected)
    rows = [
        batch.input_ids
        for batch in itertools.islice(shuffled_batches(cache, batch_size=1, seed=0), 2 * count)
    ]
    epochs = [torch.cat(rows[:count]), torch.cat(rows[count:])]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(expected.tolist())
    assert not torch.equal(*epochs)


def test_a_seed_names_an_order(folder):
    """Two seeds, two orders."""
    cache = TeacherCache.open(folder)
    first, second = (
        next(shuffled_batches(cache, batch_size=16, seed=seed)).input_ids for seed in (0, 1)
    )
    assert not torch.equal(first, second)


def test_a_nested_folder_is_found(folder, tmp_path):
    """Archives are sometimes unpacked into a folder of the same name."""
    inner = tmp_path / "name" / "name"
    inner.mkdir(parents=True)
    for path in folder.iterdir():
        (inner / path.name).write_bytes(path.read_bytes())
    assert TeacherCache.open(tmp_path).fingerprint == TeacherCache.open(folder).fingerprint


def test_a_truncated_shard_is_named(copy):
    """It is known by its size before anything is read."""
    path = copy / "shard_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheMismatch, match="shard_00001"):
        TeacherCache.open(copy)
    path.unlink()
    with pytest.raises(CacheMismatch, match="shard_00001"):
        TeacherCache.open(copy)


def test_an_altered_shard_is_named_and_not_read(copy):
    """One bit is enough; the other shards can be read."""
    path = copy / "shard_00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    cache = TeacherCache.open(copy)
    cache.batch([0])
    with pytest.raises(CacheMismatch, match="shard_00001"):
        cache.batch([0, 16])


def test_an_altered_manifest_is_refused(copy):
    """Its fields must give its fingerprint, and none may be strange."""
    path = copy / "manifest.json"
    values = json.loads(path.read_text())
    values["identity"]["seed"] = 5
    path.write_text(json.dumps(values))
    with pytest.raises(CacheMismatch, match="fingerprint"):
        TeacherCache.open(copy)
    values["strange"] = 1
    path.write_text(json.dumps(values))
    with pytest.raises(CacheMismatch, match="strange"):
        TeacherCache.open(copy)
    values["identity"]["codec_version"] = 99
    path.write_text(json.dumps(values))
    with pytest.raises(CacheMismatch, match="codec_version 99"):
        TeacherCache.open(copy)


def make_old(folder):
    """Give a cache the manifest of version 0.1.0: no added field, hash of the vocabulary."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    identity = {
        name: value for name, value in values["identity"].items() if name not in ADDED_FIELDS
    }
    vocabulary = json.dumps(tiny_tokenizer().get_vocab(), sort_keys=True, separators=(",", ":"))
    identity["tokenizer_sha256"] = hashlib.sha256(vocabulary.encode()).hexdigest()
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    values |= {"identity": identity, "fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16]}
    path.write_text(json.dumps(values))
    return values["fingerprint"]


def test_a_cache_of_version_0_1_0_still_opens(copy, tmp_path):
    """Its fingerprint stays, its tokenizer is compared by vocabulary, its documents are joined."""
    recorded = make_old(copy)
    cache = TeacherCache.open(copy)
    assert cache.fingerprint == recorded
    assert cache.batch([0]).document_ids is None
    cache.require_tokenizer(tiny_tokenizer())
    other = tiny_tokenizer()
    other.add_tokens(["cat"])
    with pytest.raises(CacheMismatch, match="tokenizer_sha256"):
        cache.require_tokenizer(other)
    assert rewrite_cache(cache, tmp_path / "again").fingerprint == recorded
    assert TeacherCache.open(tmp_path / "again").fingerprint == recorded


def test_what_does_not_belong_is_refused_with_both_values(folder):
    """Tokenizer, template, vocabulary and teacher."""
    cache = TeacherCache.open(folder)
    cache.require_tokenizer(tiny_tokenizer())
    cache.require_vocabulary(VOCAB_SIZE)
    cache.require_teacher(cache.manifest.identity.teacher_weights)
    other = tiny_tokenizer()
    other.add_tokens(["cat"])
    with pytest.raises(CacheMismatch, match="tokenizer_sha256"):
        cache.require_tokenizer(other)
    with pytest.raises(CacheMismatch, match="template_sha256"):
        cache.require_tokenizer(tiny_tokenizer("{{ messages }}"))
    with pytest.raises(CacheMismatch, match=f"vocab_size {VOCAB_SIZE}, here it is 300"):
        cache.require_vocabulary(300)
    with pytest.raises(CacheMismatch, match="teacher_weights"):
        cache.require_teacher("0" * 16)


@pytest.mark.recipe
@pytest.mark.parametrize("content", ["top-k", "sampled", "hidden"])
def test_a_batch_says_the_same_wherever_it_is(tmp_path, content):
    """Moved before it is unpacked: on the meta device even no number is computed."""
    cache = TeacherCache.open(tiny_cache(tmp_path, content=content, num_negatives=0))
    here, there = cache.batch([0, 5]), cache.batch([0, 5]).to("meta")
    assert here.to("cpu").signal.log_probs.equal(here.signal.log_probs)
    assert there.signal.kind == here.signal.kind
    assert there.signal.log_probs.device.type == "meta"
    assert there.signal.log_probs.shape == here.signal.log_probs.shape
    assert there.signal.mask.shape == here.signal.mask.shape


def test_wrong_places_are_told(folder, tmp_path):
    """No folder, an empty one, a sequence and a split that are not there."""
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TeacherCache.open(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        TeacherCache.open(tmp_path)
    cache = TeacherCache.open(folder)
    with pytest.raises(IndexError, match="outside"):
        cache.batch([cache.num_sequences])
    with pytest.raises(ValueError, match="'test' is not one of"):
        cache.sequence_ids("test")


def test_seen_tokens_are_those_of_the_training_sequences(tmp_path):
    """Held-out sequences do not count, whatever shard they are in."""
    cache = TeacherCache.open(tiny_cache(tmp_path))
    token_ids = cache.batch(cache.sequence_ids("train")).input_ids
    seen = cache.seen_tokens(VOCAB_SIZE)
    assert seen.nonzero().squeeze(1).tolist() == token_ids.unique().tolist()


def test_maps_make_room_and_shards_are_checked_once(tmp_path, monkeypatch):
    """Of more shards than may be mapped, all are read right, by a few maps and one check each."""
    monkeypatch.setattr(shard, "TOKENS_A_SHARD", 64)
    folder = tiny_cache(tmp_path, num_sequences=40)
    plain, cache = TeacherCache.open(folder), TeacherCache.open(folder)
    checked = []
    check = read.check_sha256
    expected = plain.fields(plain.sequence_ids())
    monkeypatch.setattr(read, "check_sha256", lambda *one: checked.append(one) or check(*one))
    monkeypatch.setattr(read, "MAPPED_BYTES", 3 * cache.manifest.shards[0].num_bytes)
    for _ in range(2):
        found = cache.fields(cache.sequence_ids())
        assert all(found[name].equal(field) for name, field in expected.items())
    assert len(cache.manifest.shards) == len(checked) > 3
    assert len(cache._shards) <= 3
