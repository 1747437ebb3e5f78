import pytest
import torch

from qat.cache.read import TeacherCache
from qat.evaluate import on_cache
from qat.evaluate.kl import evaluate_batches
from qat.evaluate.on_cache import evaluate_on_cache
from qat.model.surgery import quantized_layers
from tests.tiny import tiny_cache, tiny_llama, tiny_student

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Caches of one teacher, by content; the last one has nothing held out."""
    return {
        "top-k": TeacherCache.open(tiny_cache(tmp_path_factory.mktemp("a"))),
        "hidden": TeacherCache.open(tiny_cache(tmp_path_factory.mktemp("b"), content="hidden")),
        "sampled": TeacherCache.open(
            tiny_cache(tmp_path_factory.mktemp("c"), content="sampled", top_k=8)
        ),
        "whole": TeacherCache.open(tiny_cache(tmp_path_factory.mktemp("d"), heldout_ratio=0.0)),
    }


def measure(model, cache, **changes):
    return evaluate_on_cache(model, cache, device=CPU, dtype=torch.float32, **changes)


@pytest.mark.parametrize("content", ["top-k", "hidden", "whole"])
def test_the_teacher_is_near_its_own_word(caches, content):
    """What a cache keeps is the teacher, to the precision that it is kept in."""
    found = measure(tiny_llama(), caches[content])
    assert abs(found["kl_nats"]) < 2e-3
    assert found["top1_agreement"] > 0.97


def test_contents_agree_on_a_students_distance(caches):
    """Bounded from below by top-k, near the exact one of hidden states, unbiased by draws."""
    found = {name: measure(tiny_student(), cache) for name, cache in caches.items()}
    exact = found["hidden"]["kl_nats"]
    assert found["top-k"]["kl_nats"] <= exact * 1.02
    assert found["sampled"]["kl_nats"] == pytest.approx(exact, rel=0.25)
    perplexities = [found[name]["perplexity"] for name in ("top-k", "hidden", "sampled")]
    assert perplexities == pytest.approx([perplexities[0]] * 3)


@pytest.mark.parametrize("num_sequences", [None, 1, 5, 1000])
def test_the_held_out_split_is_measured(caches, num_sequences):
    """In order, at most so many sequences, every counted token of each."""
    cache = caches["top-k"]
    ids = cache.sequence_ids("heldout")[:num_sequences]
    found = measure(tiny_student(), cache, num_sequences=num_sequences)
    batch = cache.batch(ids)
    assert found["tokens"] == int(batch.signal.mask.sum())
    plain = evaluate_batches(tiny_student(), [(batch.input_ids, batch.signal)], description="t")
    assert found == {
        name: value and pytest.approx(value, rel=1e-5) for name, value in plain.items()
    }


def test_without_a_held_out_split_all_is_measured(caches):
    """Nothing else is there."""
    cache = caches["whole"]
    assert cache.manifest.num_heldout == 0
    found = measure(tiny_student(), cache)
    assert found["tokens"] == int(cache.batch(cache.sequence_ids("all")).signal.mask.sum())


def test_kd_loss_is_of_the_first_sequences(caches, monkeypatch):
    """The seeds' habit is 40 sequences; everything else is measured on all."""
    cache = caches["top-k"]
    all_of_it = measure(tiny_student(), cache)
    monkeypatch.setattr(on_cache, "KD_SEQUENCES", 3)
    found = measure(tiny_student(), cache)
    first = measure(tiny_student(), cache, num_sequences=3)
    assert found["kd_loss"] == pytest.approx(first["kd_loss"], rel=1e-6)
    assert found["kl_nats"] == pytest.approx(all_of_it["kl_nats"], rel=1e-6)
    assert found["kd_loss"] != pytest.approx(all_of_it["kd_loss"], rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_batch_size_is_nobodys_business(caches, batch_size):
    """The same numbers."""
    usual = measure(tiny_student(), caches["top-k"])
    found = measure(tiny_student(), caches["top-k"], batch_size=batch_size)
    assert found == {name: pytest.approx(value, rel=1e-5) for name, value in usual.items()}


def test_weights_are_formed_once(caches):
    """And held for the forwards that follow, in the compute dtype."""
    student = tiny_student()
    evaluate_on_cache(student.bfloat16(), caches["top-k"], device=CPU, dtype=torch.bfloat16)
    layers = quantized_layers(student).values()
    assert all(layer.held_weight.dtype == torch.bfloat16 for layer in layers)
