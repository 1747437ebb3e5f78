import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from qat.cache.build import rewrite_cache
from qat.cache.manifest import CacheMismatch
from qat.pipelines.open_cache import open_teacher_cache

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
B, L, K, R, V = 5, 8, 4, 3, 40


def seed_shard(count=B, *, seed=0, negatives=R):
    """A shard with the seeds' keys and dtypes."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, L - 1, V, generator=generator)
    top = logits.topk(K)
    shard = {
        "input_ids": torch.randint(V, (count, L), generator=generator, dtype=torch.int32),
        "attention_mask": torch.ones(count, L, dtype=torch.uint8),
        "topk_idx": top.indices.int(),
        "topk_logits": top.values.half(),
    }
    if negatives:
        ids = torch.randint(V, (count, L - 1, negatives), generator=generator)
        shard["rand_idx"] = ids.int()
        shard["rand_logits"] = logits.gather(-1, ids).half()
    return shard


@pytest.fixture
def seeds_cache(tmp_path):
    """Three shards of 5, 5 and 2 sequences, nested in a folder of the same name."""
    folder = tmp_path / "name" / "name"
    folder.mkdir(parents=True)
    for index, count in enumerate((5, 5, 2)):
        torch.save(seed_shard(count, seed=index), folder / f"shard_{index:05d}.pt")
    meta = {"vocab_size": V, "teacher_model": "tiny", "chat_thinking": "both"}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def test_the_signal_is_the_softmax_over_the_kept_ids(seeds_cache):
    """Nothing is known of the rest, and the signal says so."""
    cache = open_teacher_cache(seeds_cache.parents[1])
    batch = cache.batch(np.array([11, 6, 0]))
    for row, (index, inside) in enumerate([(2, 1), (1, 1), (0, 0)]):
        shard = seed_shard((5, 5, 2)[index], seed=index)
        assert torch.equal(batch.input_ids[row], shard["input_ids"][inside].long())
        truth = shard["topk_logits"][inside].float().log_softmax(-1)
        assert torch.equal(batch.signal.log_probs[row], truth)
        assert torch.equal(batch.signal.token_ids[row], shard["topk_idx"][inside].long())
    assert batch.signal.kind == "conditional"
    assert batch.document_ids is None
    assert batch.signal.mask.all()
    assert (cache.num_sequences, cache.seq_len, cache.vocab_size) == (12, L, V)
    assert len(cache.sequence_ids("heldout")) == 2


def test_rewriting_loses_nothing(seeds_cache, tmp_path):
    """Same signal to the bit, same fingerprint, half the bytes of ids."""
    before = open_teacher_cache(seeds_cache)
    rewrite_cache(before, tmp_path / "ours")
    after = open_teacher_cache(tmp_path / "ours")
    ids = before.sequence_ids()
    for name, field in before.fields(ids).items():
        assert torch.equal(field, after.fields(ids)[name]), name
    assert torch.equal(before.batch(ids).signal.log_probs, after.batch(ids).signal.log_probs)
    assert after.fingerprint == before.fingerprint
    assert after.batch([0]).signal.kind == "conditional"
    stored = after.stored_bytes()
    assert stored["token_ids"] == stored["logits"]
    with pytest.raises(FileExistsError, match="exists"):
        rewrite_cache(before, tmp_path / "ours")


def test_older_shards_are_read(tmp_path):
    """No mask, one example without its axis, no meta, torch's form before the zip."""
    shard = {key: field[0] for key, field in seed_shard(negatives=0).items()}
    del shard["attention_mask"]
    torch.save(shard, tmp_path / "shard_00000.pt", _use_new_zipfile_serialization=False)
    cache = open_teacher_cache(tmp_path)
    assert cache.batch([0]).signal.mask.shape == (1, L - 1)
    assert cache.vocab_size is None
    cache.require_vocabulary(12345)


def break_shard(path, how):
    if how == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif how == "missing":
        path.unlink()
    elif how == "pickled":
        torch.save(Path("x"), path)
    elif how == "other":
        torch.save(torch.zeros(3), path)
    else:
        shard = seed_shard()
        if how == "key":
            del shard["topk_logits"]
        elif how == "width":
            shard["topk_idx"] = shard["topk_idx"][..., :2]
        else:
            shard["topk_idx"] = shard["topk_idx"][:, :2]
        torch.save(shard, path)


@pytest.mark.parametrize("how", ["cut", "missing", "pickled", "other", "key", "width", "length"])
def test_a_bad_shard_is_named(seeds_cache, how):
    """Cut, gone, holding code, something else, or unlike the first."""
    break_shard(seeds_cache / "shard_00001.pt", how)
    with pytest.raises(CacheMismatch, match="shard_00001"):
        open_teacher_cache(seeds_cache)


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="no fixtures next to the checkout")
@pytest.mark.parametrize("name", ["v1_q2a4_qwen3", "v2_q2a4_qwen3", "v2_q4a4_qwen3"])
def test_the_teacher_agrees_with_its_cache(name):
    """The base model as its own student: the seeds' loss (temperature 2, times 4) is nothing."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FIXTURES / name / "base")
    cache = open_teacher_cache(FIXTURES / name / "caches")
    batch = cache.batch(cache.sequence_ids()[:40])
    with torch.no_grad():
        logits = model(batch.input_ids[:, :-1]).logits.gather(-1, batch.signal.token_ids)
    teacher = (batch.signal.log_probs / 2).log_softmax(-1)
    student = (logits / 2).log_softmax(-1)
    loss = 4 * (teacher.exp() * (teacher - student)).sum(-1).mean()
    assert loss < 1e-3


def test_a_folder_of_other_files_is_no_cache(tmp_path):
    """A stray model file does not make one."""
    torch.save(torch.zeros(3), tmp_path / "v2_benchmark_model.pt")
    with pytest.raises(FileNotFoundError, match="no cache"):
        open_teacher_cache(tmp_path)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"topk_idx": 3.0}, "topk_idx is no tensor of 3 axes"),
        ({"input_ids": torch.zeros(B, L, 2)}, "input_ids is no tensor of 2 axes"),
        ({"topk_logits": torch.full((B, L - 1, K), float("nan"))}, "logits holds NaN"),
        ({"topk_idx": torch.full((B, L - 1, K), -1)}, "token_ids reaches -1"),
        ({"input_ids": torch.zeros(B, L)}, "input_ids is of torch.float32"),
    ],
)
def test_a_shard_of_another_form_is_named(tmp_path, change, said):
    """Its tensors were used before anybody had looked at them."""
    torch.save(seed_shard() | change, tmp_path / "shard_00000.pt")
    with pytest.raises(CacheMismatch, match=rf"shard_00000\.pt: {said}"):
        _ = open_teacher_cache(tmp_path).batch([0]).signal


@pytest.mark.parametrize("meta", [[], 3, {"vocab_size": "40"}, {"teacher_model": 1}])
def test_a_meta_file_of_another_form_is_named(seeds_cache, meta):
    """Field by field it was taken as it came."""
    (seeds_cache / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(CacheMismatch, match=r"meta\.json: .*Expected"):
        open_teacher_cache(seeds_cache)
