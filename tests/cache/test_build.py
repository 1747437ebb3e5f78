import filecmp
import json

import numpy as np
import pytest
import torch

from qat.cache import shard
from qat.cache.build import default_batch_size, write_cache
from qat.cache.manifest import CacheIdentity, CacheMismatch
from qat.cache.read import TeacherCache
from qat.data.config import TextConfig
from qat.data.text import read_blocks
from qat.distill.teacher import dense_signal
from qat.model.head import hidden_states, logits_of
from qat.runtime.device import Device
from tests.tiny import (
    TINY_MODELS,
    VOCAB_SIZE,
    tiny_llama,
    tiny_records,
    tiny_tokenizer,
    write_jsonl,
)

SEQ_LEN = 16
CPU = Device.detect("cpu")
TOP_K = {"top-k": 8, "sampled": 4, "hidden": 0}


class Killed(BaseException):
    """Stands for a kill: nothing in the package may catch it."""


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    path = write_jsonl(tmp_path_factory.mktemp("data") / "a.jsonl", tiny_records(30))
    plan = TextConfig(seq_len=SEQ_LEN, num_sequences=40)
    return read_blocks(str(path), tiny_tokenizer(), plan)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """10 sequences a shard, which no batch of 4 divides."""
    monkeypatch.setattr(shard, "TOKENS_A_SHARD", 10 * SEQ_LEN)


def identity_of(content="top-k", **changes):
    values = {
        "content": content,
        "teacher_weights": "w",
        "tokenizer_sha256": "t",
        "template_sha256": None,
        "data_revision": "d",
        "format": "alpaca",
        "thinking": "none",
        "loss_on": "all",
        "seq_len": SEQ_LEN,
        "top_k": TOP_K[content],
        "num_draws": 6 if content == "sampled" else 0,
        "heldout_ratio": 0.125,
        "seed": 0,
        "dtype": "fp32",
        "documents": "separate",
    }
    return CacheIdentity(**{**values, **changes})


def build(folder, blocks, *, teacher=None, content="top-k", batch_size=4, **changes):
    return write_cache(
        teacher or tiny_llama(),
        blocks,
        identity_of(content, **changes),
        folder,
        teacher_name="tiny",
        data_name="a.jsonl",
        batch_size=batch_size,
        device=CPU,
    )


def die_after(model, num_calls):
    """Make a model raise `Killed` in its forward number `num_calls`."""
    calls = []

    def count(*_):
        calls.append(1)
        if len(calls) > num_calls:
            raise Killed

    model.get_decoder().register_forward_pre_hook(count)
    return model


def assert_same_folders(first, second):
    """All files of both, byte for byte."""
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    _, different, failed = filecmp.cmpfiles(first, second, names, shallow=False)
    assert different == failed == []


@pytest.mark.parametrize(
    ("content", "name", "tied"),
    [
        *(("hidden", name, tied) for name in TINY_MODELS for tied in (True, False)),
        ("top-k", "llama", True),
        ("top-k", "gemma", False),
        ("sampled", "llama", False),
        ("sampled", "qwen3", True),
    ],
)
def test_a_cache_says_what_the_live_teacher_says(tmp_path, blocks, content, name, tied):
    """Signal by signal: same ids, probabilities, masks and order as the teacher's own logits."""
    teacher = TINY_MODELS[name](tied=tied)
    build(tmp_path / "c", blocks, teacher=teacher, content=content)
    cache = TeacherCache.open(tmp_path / "c")
    batch = cache.batch(cache.sequence_ids())
    assert torch.equal(batch.input_ids, blocks.token_ids.long())
    assert torch.equal(batch.document_ids, blocks.document_ids.long())
    ids = batch.input_ids[:, :-1], batch.document_ids[:, :-1]
    logits = logits_of(teacher, hidden_states(teacher, *ids))
    live = dense_signal(logits, blocks.loss_mask[:, 1:])
    assert torch.equal(batch.signal.mask, live.mask)
    if content == "hidden":
        p, q = live.log_probs.exp(), batch.signal.log_probs
        assert (p * (live.log_probs - q)).sum(-1).mean() < 2e-4
    else:
        truth = live.log_probs.gather(-1, batch.signal.token_ids)
        torch.testing.assert_close(batch.signal.log_probs, truth, atol=1e-2, rtol=0)


def test_final_softcap_reaches_the_reader(tmp_path, blocks):
    """Gemma's cap on logits is part of the head that a hidden cache keeps."""
    teacher = TINY_MODELS["gemma"](final_logit_softcapping=1.5)
    build(tmp_path / "c", blocks, teacher=teacher, content="hidden", documents="joined")
    batch = TeacherCache.open(tmp_path / "c").batch([0])
    live = dense_signal(teacher(batch.input_ids[:, :-1]).logits, batch.signal.mask)
    torch.testing.assert_close(batch.signal.log_probs, live.log_probs, atol=0.05, rtol=0)


@pytest.mark.recipe
@pytest.mark.parametrize("content", TOP_K)
def test_two_builds_are_equal_to_the_byte(tmp_path, blocks, content):
    """A cache follows from its identity; the batch size changes nothing in float32 here."""
    build(tmp_path / "a", blocks, content=content)
    build(tmp_path / "b", blocks, content=content)
    assert_same_folders(tmp_path / "a", tmp_path / "b")


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("content", "num_calls"),
    [("top-k", 0), ("top-k", 5), ("top-k", 9), ("hidden", 0), ("hidden", 14), ("sampled", 9)],
)
def test_a_cut_build_continues_to_the_same_bytes(tmp_path, blocks, content, num_calls):
    """Wherever it was cut: nothing half is kept, nothing whole is made again."""
    build(tmp_path / "a", blocks, content=content)
    with pytest.raises(Killed):
        build(tmp_path / "b", blocks, teacher=die_after(tiny_llama(), num_calls), content=content)
    assert not (tmp_path / "b" / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match="cut short"):
        TeacherCache.open(tmp_path / "b")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "b").glob("shard*")}
    (tmp_path / "b" / ".shard_00001.safetensors.x.part").write_bytes(b"left by a kill")
    build(tmp_path / "b", blocks, content=content)
    assert_same_folders(tmp_path / "a", tmp_path / "b")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "b").glob("shard*")}
    assert before.items() <= after.items()


@pytest.mark.recipe
@pytest.mark.parametrize("content", TOP_K)
def test_a_cut_build_continues_with_another_batch_size(tmp_path, blocks, content):
    """The scale of hidden states came from the first batch; kept shards had that of another."""
    teacher = tiny_llama()
    whole = build(tmp_path / "a", blocks, content=content)
    with pytest.raises(Killed):
        build(tmp_path / "b", blocks, teacher=die_after(teacher, 14), content=content)
    build(tmp_path / "b", blocks, content=content, batch_size=3)
    first, second = TeacherCache.open(tmp_path / "a"), TeacherCache.open(tmp_path / "b")
    assert len(whole[0].shards) > 2
    for row in range(len(blocks)):
        signals = [cache.batch([row]).signal.log_probs for cache in (first, second)]
        torch.testing.assert_close(*signals, atol=2e-2, rtol=0)


@pytest.mark.recipe
def test_shards_whose_scale_is_lost_are_made_again(tmp_path, blocks):
    """A head that cannot be read leaves shards that nobody can decode."""
    build(tmp_path / "a", blocks, content="hidden")
    with pytest.raises(Killed):
        build(tmp_path / "b", blocks, teacher=die_after(tiny_llama(), 14), content="hidden")
    (tmp_path / "b" / "head.safetensors").write_bytes(b"cut")
    build(tmp_path / "b", blocks, content="hidden", batch_size=3)
    first, second = TeacherCache.open(tmp_path / "a"), TeacherCache.open(tmp_path / "b")
    for row in range(len(blocks)):
        signals = [cache.batch([row]).signal.log_probs for cache in (first, second)]
        torch.testing.assert_close(*signals, atol=2e-2, rtol=0)


def test_joined_documents_attend_to_each_other(tmp_path, blocks):
    """As in caches of version 0.1.0, whose readers get no document ids."""
    build(tmp_path / "c", blocks, documents="joined")
    batch = TeacherCache.open(tmp_path / "c").batch(np.arange(len(blocks)))
    assert batch.document_ids is None
    live = tiny_llama()(batch.input_ids[:, :-1]).logits.log_softmax(-1)
    truth = live.gather(-1, batch.signal.token_ids)
    torch.testing.assert_close(batch.signal.log_probs, truth, atol=1e-2, rtol=0)


def test_a_heads_bias_reaches_the_reader(tmp_path, blocks):
    """Each token's own number."""
    teacher = tiny_llama(tied=False)
    teacher.lm_head = torch.nn.Linear(64, VOCAB_SIZE).requires_grad_(False)
    build(tmp_path / "c", blocks, teacher=teacher, content="hidden", documents="joined")
    batch = TeacherCache.open(tmp_path / "c").batch([0])
    live = dense_signal(teacher(batch.input_ids[:, :-1]).logits, batch.signal.mask)
    torch.testing.assert_close(batch.signal.log_probs, live.log_probs, atol=0.05, rtol=0)


@pytest.mark.recipe
def test_a_damaged_shard_of_a_cut_build_is_made_again(tmp_path, blocks):
    """What cannot be read, or holds other tokens, is not taken over."""
    build(tmp_path / "a", blocks)
    with pytest.raises(Killed):
        build(tmp_path / "b", blocks, teacher=die_after(tiny_llama(), 14))
    first, second = sorted((tmp_path / "b").glob("shard*"))[:2]
    first.write_bytes(first.read_bytes()[:100])
    second.write_bytes((tmp_path / "a" / "shard_00000.safetensors").read_bytes())
    build(tmp_path / "b", blocks)
    assert_same_folders(tmp_path / "a", tmp_path / "b")


def test_a_whole_cache_is_found(tmp_path, blocks):
    """The teacher is not asked again."""
    build(tmp_path / "c", blocks)
    manifest, rates = build(tmp_path / "c", blocks, teacher=die_after(tiny_llama(), 0))
    assert manifest.num_sequences == len(blocks)
    assert rates.tokens_per_second is None


def test_another_cache_in_the_folder_is_refused(tmp_path, blocks):
    """Whole or cut short, with the field that differs and both values."""
    build(tmp_path / "whole", blocks)
    with pytest.raises(CacheMismatch, match="seed 0, asked for is 1"):
        build(tmp_path / "whole", blocks, seed=1)
    with pytest.raises(Killed):
        build(tmp_path / "cut", blocks, teacher=die_after(tiny_llama(), 5))
    with pytest.raises(CacheMismatch, match="top_k 8, asked for is 9"):
        build(tmp_path / "cut", blocks, top_k=9)


def test_a_build_of_another_version_is_not_gone_on_with(tmp_path, blocks):
    """Its fields are strange, so its shards are not to be trusted."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "building.json").write_text('{"strange": 1}')
    with pytest.raises(CacheMismatch, match="content is missing; remove"):
        build(tmp_path / "c", blocks)


def test_two_builders_do_not_share_a_folder(tmp_path, blocks):
    """The second is refused; the first continues."""
    teacher = tiny_llama()

    def build_again(*_):
        with pytest.raises(ValueError, match="in use by process"):
            build(tmp_path / "c", blocks)

    handle = teacher.register_forward_pre_hook(build_again)
    build(tmp_path / "c", blocks, teacher=teacher)
    handle.remove()
    assert (tmp_path / "c" / "manifest.json").exists()


@pytest.mark.recipe
def test_negatives_do_not_change_the_signal(tmp_path, blocks):
    """They are uniform over the vocabulary, equal for equal seeds."""
    build(tmp_path / "a", blocks)
    build(tmp_path / "b", blocks, num_negatives=64)
    plain, drawn = TeacherCache.open(tmp_path / "a"), TeacherCache.open(tmp_path / "b")
    ids = plain.sequence_ids()
    assert torch.equal(plain.batch(ids).signal.log_probs, drawn.batch(ids).signal.log_probs)
    negatives = drawn.fields(ids)["negative_ids"]
    assert negatives.shape == (len(blocks), SEQ_LEN - 1, 64)
    counts = torch.bincount(negatives.flatten(), minlength=VOCAB_SIZE).double()
    assert counts.min() > 0.7 * counts.mean()


@pytest.mark.recipe
def test_a_sampled_position_takes_at_most_100_bytes_of_a_large_vocabulary(tmp_path):
    """Where ids take 4 bytes."""
    vocab_size = 150_000
    teacher = tiny_llama(vocab_size=vocab_size, hidden_size=32, intermediate_size=32)
    path = write_jsonl(tmp_path / "b.jsonl", tiny_records(6))
    plan = TextConfig(seq_len=64, num_sequences=2)
    text_blocks = read_blocks(str(path), tiny_tokenizer(), plan)
    shape = {"content": "sampled", "top_k": 8, "seq_len": 64}
    manifest, _ = build(tmp_path / "c", text_blocks, teacher=teacher, batch_size=8, **shape)
    header_bytes = 1200 * len(manifest.shards)
    assert manifest.bytes_per_token - header_bytes / manifest.num_tokens <= 100


def test_the_manifest_has_no_place_and_no_time(tmp_path, blocks):
    """Else two machines could not have the same cache."""
    build(tmp_path / "c", blocks)
    text = (tmp_path / "c" / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["fingerprint"] == identity_of().fingerprint


def test_the_default_batch_feeds_the_device():
    """About 1024 tokens on a CPU, and never no block at all."""
    assert default_batch_size(CPU, 64) == 16
    assert default_batch_size(CPU, 4096) == 1
