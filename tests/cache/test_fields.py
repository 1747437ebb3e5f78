import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat.cache.manifest import CacheMismatch
from qat.cache.read import TeacherCache
from qat.legacy.cache import open_seed_cache
from qat.storage.files import sha256_of_file
from tests.tiny import VOCAB_SIZE, tiny_cache


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """A cache of each content, as field name to tensor and manifest."""
    folder = tmp_path_factory.mktemp("caches")
    contents = {"top-k": {}, "sampled": {"num_negatives": 2}, "hidden": {"num_sequences": 16}}
    return {
        name: tiny_cache(folder / name, content=name, **changes)
        for name, changes in contents.items()
    }


def damaged(source, target, change, name="shard_00000.safetensors"):
    """Copy a cache, change the fields of a file, and write its checksum anew."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    fields = load_file(source / name)
    change(fields)
    save_file({k: v.contiguous() for k, v in fields.items()}, target / name)
    manifest = json.loads((target / "manifest.json").read_text())
    for entry in filter(None, [*manifest["shards"], manifest["head"]]):
        path = target / entry["file"]
        entry |= {"sha256": sha256_of_file(path), "num_bytes": path.stat().st_size}
    (target / "manifest.json").write_text(json.dumps(manifest))
    return TeacherCache.open(target)


def one_value(name, value):
    """Return a change of one number of a field."""

    def change(fields):
        fields[name] = fields[name].clone()
        fields[name].view(-1)[3] = value

    return change


def other(name, make):
    """Return a change of a whole field."""
    return lambda fields: fields.update({name: make(fields[name])})


@pytest.mark.parametrize(
    ("content", "change", "said"),
    [
        ("top-k", one_value("input_ids", VOCAB_SIZE), r"input_ids reaches .* \.\. 272"),
        ("top-k", one_value("token_ids", 60_000), "token_ids reaches"),
        ("top-k", other("input_ids", lambda ids: ids.to(torch.int32) - 300), "reaches -"),
        ("top-k", one_value("log_probs", float("nan")), "log_probs holds NaN"),
        ("top-k", one_value("log_tail", 2.0), "log_tail holds .* above 1"),
        ("top-k", other("log_probs", lambda field: field[:, :, :4]), "log_probs has shape"),
        ("top-k", other("input_ids", lambda field: field[:-1]), "input_ids has shape"),
        ("top-k", other("loss_mask", lambda field: field.float()), "loss_mask is of torch.float32"),
        ("top-k", lambda fields: fields.pop("document_ids"), "document_ids is missing"),
        ("top-k", lambda fields: fields.update(x=torch.ones(1)), "x is unknown"),
        ("sampled", one_value("draw_ids", VOCAB_SIZE), "draw_ids reaches"),
        ("sampled", one_value("negative_ids", VOCAB_SIZE), "negative_ids reaches"),
        ("hidden", one_value("hidden_scale", float("inf")), "hidden_scale holds NaN, infinity"),
        ("hidden", other("hidden_scale", lambda field: field.repeat(1, 1, 3)), "does not divide"),
    ],
)
def test_a_shard_that_is_not_as_promised_is_refused_when_opened(
    caches, tmp_path, content, change, said
):
    """Ids outside the vocabulary reached an embedding; now file and field are named."""
    cache = damaged(caches[content], tmp_path / "c", change)
    with pytest.raises(CacheMismatch, match=rf"shard_00000\.safetensors: .*{said}.*again"):
        cache.batch([0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (one_value("weight", float("nan")), "weight holds NaN"),
        (other("weight", lambda field: field[:-1]), "weight has shape"),
        (lambda fields: fields.pop("channel_scale"), "channel_scale is missing"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(caches, tmp_path, change, said):
    """Before its logits are formed."""
    cache = damaged(caches["hidden"], tmp_path / "c", change, "head.safetensors")
    with pytest.raises(CacheMismatch, match=rf"head\.safetensors: .*{said}"):
        _ = cache.batch([0]).signal


def test_ids_of_a_cache_that_does_not_say_are_bounded_by_the_model(tmp_path):
    """An old cache knows no vocabulary; the student's is asked."""
    ids = torch.full((9, 8), 300)
    shard = {
        "input_ids": ids,
        "topk_idx": torch.zeros(9, 7, 2, dtype=torch.int64),
        "topk_logits": torch.zeros(9, 7, 2),
    }
    torch.save(shard, tmp_path / "shard_00000.pt")
    cache = open_seed_cache(tmp_path)
    cache.require_vocabulary(272)
    with pytest.raises(CacheMismatch, match=r"input_ids reaches 300 \.\. 300, .* has 272"):
        cache.batch([0])
    cache = open_seed_cache(tmp_path)
    cache.require_vocabulary(301)
    assert cache.batch([0]).input_ids.shape == (1, 8)
