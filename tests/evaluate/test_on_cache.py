import pytest
import torch

from qat.cache.read import TeacherCache
from qat.evaluate import kl, on_cache
from qat.evaluate.kl import evaluate_batches
from qat.evaluate.on_cache import evaluate_on_cache
from qat.model.head import hidden_states, logits_of
from qat.model.surgery import quantized_layers
from qat.runtime.device import Device
from tests.tiny import LargestTensor, tiny_cache, tiny_llama, tiny_model, tiny_student

CPU = torch.device("cpu")
KL = {"top-k": "kl_nats_lower", "hidden": "kl_nats", "whole": "kl_nats_lower"}


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
def test_the_teacher_is_near_what_the_cache_keeps_of_it(caches, content):
    """To the precision that it is kept in."""
    found = measure(tiny_llama(), caches[content])
    assert abs(found[KL[content]]) < 2e-3
    assert found["top1_agreement"] > 0.97


def test_contents_agree_on_a_students_distance(caches):
    """Only hidden states give it exactly; top-k from below, draws without bias, under that name."""
    found = {name: measure(tiny_student(), cache) for name, cache in caches.items()}
    exact = found["hidden"]["kl_nats"]
    assert found["top-k"]["kl_nats_lower"] <= exact * 1.02
    assert found["sampled"]["kl_nats_lower"] == pytest.approx(exact, rel=0.25)
    assert [found[name]["kl_nats"] for name in ("top-k", "sampled")] == [None, None]
    assert found["hidden"]["kl_nats_lower"] is None
    perplexities = [found[name]["perplexity"] for name in ("top-k", "hidden", "sampled")]
    assert perplexities == pytest.approx([perplexities[0]] * 3)


@pytest.mark.parametrize("content", ["top-k", "hidden", "sampled"])
def test_a_live_teacher_gives_the_exact_distance(caches, content):
    """KL over the whole vocabulary on the held-out tokens, whatever the cache keeps of it."""
    cache, student, teacher = caches[content], tiny_student(), tiny_llama()
    found = measure(student, cache, teacher=teacher)
    batch = cache.batch(cache.sequence_ids("heldout"))
    packed = (batch.input_ids, batch.document_ids)
    logits = [logits_of(m, hidden_states(m, *packed))[:, :-1] for m in (teacher, student)]
    log_p, log_q = (one.log_softmax(-1) for one in logits)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)[batch.mask].mean().item()
    assert found["kl_nats"] == pytest.approx(expected, rel=1e-5)
    assert found["kl_nats_lower"] is None
    without = measure(student, cache)
    assert {found[name] for name in ("kd_loss", "perplexity", "tokens")} == {
        without[name] for name in ("kd_loss", "perplexity", "tokens")
    }
    assert measure(teacher, cache, teacher=teacher)["kl_nats"] == pytest.approx(0, abs=1e-6)


@pytest.mark.recipe
@pytest.mark.parametrize("family", ["phi", "gemma2", "granite", "cohere"])
def test_hidden_states_give_every_familys_logits(tmp_path, family):
    """A head's bias, factor and soft cap are kept in the cache."""
    teacher = tiny_model(family, tied=False)
    if teacher.lm_head.bias is not None:
        teacher.lm_head.bias.normal_()
    cache = TeacherCache.open(tiny_cache(tmp_path, teacher, content="hidden"))
    assert measure(teacher, cache)["kl_nats"] == pytest.approx(0, abs=5e-3)


@pytest.mark.recipe
def test_hidden_states_become_logits_a_chunk_at_a_time(tmp_path, monkeypatch):
    """At a large vocabulary no tensor is larger than a chunk's logits, or than the head."""
    vocab_size, chunk_bytes = 8192, kl.CHUNK_BYTES // 32  # of 262,144 in whole chunks
    monkeypatch.setattr(kl, "CHUNK_BYTES", chunk_bytes)
    sizes = {"hidden_size": 16, "head_dim": 4, "intermediate_size": 16}
    teacher = tiny_llama(vocab_size=vocab_size, **sizes)
    cache = TeacherCache.open(
        tiny_cache(tmp_path, teacher, content="hidden", seq_len=64, heldout_ratio=0.5)
    )
    with LargestTensor() as largest:
        found = measure(teacher, cache)
    assert found["tokens"] * vocab_size * 4 > 2 * chunk_bytes
    assert chunk_bytes / 2 < largest.num_bytes <= chunk_bytes


@pytest.mark.parametrize("num_sequences", [None, 1, 5, 1000])
def test_the_held_out_split_is_measured(caches, num_sequences):
    """In order, at most so many sequences, every counted token of each."""
    cache = caches["top-k"]
    ids = cache.sequence_ids("heldout")[:num_sequences]
    found = measure(tiny_student(), cache, num_sequences=num_sequences)
    batch = cache.batch(ids)
    assert found["tokens"] == int(batch.signal.mask.sum())
    packed = (batch.input_ids, batch.signal, batch.document_ids)
    plain = evaluate_batches(tiny_student(), [packed], description="t")
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
    """As the Speedrun Log's is; everything else is measured on all."""
    cache = caches["top-k"]
    all_of_it = measure(tiny_student(), cache)
    monkeypatch.setattr(on_cache, "KD_SEQUENCES", 3)
    found = measure(tiny_student(), cache)
    first = measure(tiny_student(), cache, num_sequences=3)
    assert found["kd_loss"] == pytest.approx(first["kd_loss"], rel=1e-6)
    assert found["kl_nats_lower"] == pytest.approx(all_of_it["kl_nats_lower"], rel=1e-6)
    assert found["kd_loss"] != pytest.approx(all_of_it["kd_loss"], rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_batch_size_changes_no_number(caches, batch_size):
    """It bounds memory only."""
    usual = measure(tiny_student(), caches["top-k"])
    found = measure(tiny_student(), caches["top-k"], batch_size=batch_size)
    assert found == {
        name: value and pytest.approx(value, rel=1e-4) for name, value in usual.items()
    }


def test_weights_are_formed_once(caches):
    """And held for the forwards that follow, in the compute dtype."""
    student = tiny_student()
    evaluate_on_cache(student.bfloat16(), caches["top-k"], device=CPU, dtype=torch.bfloat16)
    layers = quantized_layers(student).values()
    assert all(layer.held_weight.dtype == torch.bfloat16 for layer in layers)


def test_weights_are_formed_once_where_there_is_room_for_them(caches, monkeypatch):
    """Otherwise at every use, to the same numbers, and none stays."""
    found = []
    for total in (2**40, 2**10):
        monkeypatch.setattr(Device, "total_bytes", lambda _device, total=total: total)
        student = tiny_student()
        found.append(measure(student, caches["top-k"]))
        is_held = [layer.held_weight is not None for layer in quantized_layers(student).values()]
        assert set(is_held) == {total > 2**20}
    assert found[0] == found[1]
