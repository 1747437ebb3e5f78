import math

import pytest
import torch
from torch.nn import functional

from qat.distill.kl import forward_kl, kd_loss
from qat.distill.teacher import dense_signal, top_k_signal
from qat.evaluate import kl
from qat.evaluate.kl import (
    LazyTeacher,
    evaluate_batches,
    live_teacher,
    mean_and_stderr,
    perplexity_of,
)
from qat.model.head import hidden_states, logits_of
from tests.tiny import LargestTensor, tiny_llama


def problem(*, rows=6, length=9, ratio=0.7, top_k=None):
    """Return token ids and another model's logits on them as a signal."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(261, (rows, length), generator=generator)
    mask = torch.rand(rows, length - 1, generator=generator) < ratio
    logits = tiny_llama(seed=1)(token_ids).logits[:, :-1]
    signal = dense_signal(logits, mask) if top_k is None else top_k_signal(logits, mask, top_k)
    return token_ids, signal


def near(values):
    """Return what equals these numbers to float32's precision."""
    return {name: value and pytest.approx(value, rel=1e-4) for name, value in values.items()}


def in_parts(token_ids, signal, size):
    return [
        (token_ids[n : n + size], signal.map(lambda t, n=n: t[n : n + size]))
        for n in range(0, len(token_ids), size)
    ]


@pytest.mark.parametrize("top_k", [None, 8])
def test_each_number_is_what_it_is_called(top_k):
    """Against plain means over the positions that count."""
    model = tiny_llama()
    token_ids, signal = problem(top_k=top_k)
    found = evaluate_batches(model, [(token_ids, signal)], description="test")
    logits = model(token_ids).logits[:, :-1]
    mask = signal.mask
    best = signal.log_probs.argmax(-1)
    if top_k is not None:
        best = signal.token_ids[..., 0]
    nll = functional.cross_entropy(logits[mask], token_ids[:, 1:][mask])
    assert found["tokens"] == int(mask.sum())
    kl = forward_kl(logits, signal)[mask]
    exact, lower = ("kl_nats", "kl_nats_lower") if top_k is None else ("kl_nats_lower", "kl_nats")
    assert found[exact] == pytest.approx(kl.mean().item(), 1e-5)
    assert found[lower] is None
    for name, share in (
        ("median", 0.5),
        ("p90", 0.9),
        ("p95", 0.95),
        ("p99", 0.99),
        ("p999", 0.999),
    ):
        assert found[f"kl_{name}"] == pytest.approx(kl.quantile(share).item(), rel=1e-4)
    assert found["kl_max"] == pytest.approx(kl.max().item(), rel=1e-4)
    assert found["kd_loss"] == pytest.approx(kd_loss(logits, signal)[mask].mean().item(), 1e-5)
    assert found["perplexity"] == pytest.approx(nll.exp().item(), 1e-4)
    agreement = (logits.argmax(-1) == best)[mask].float().mean().item()
    assert found["top1_agreement"] == pytest.approx(agreement)


def test_how_sequences_are_batched_does_not_matter():
    """Means are over tokens, not over batches; the error bar is over sequences."""
    model = tiny_llama()
    token_ids, signal = problem()
    whole = evaluate_batches(model, [(token_ids, signal)], description="test")
    parts = evaluate_batches(model, in_parts(token_ids, signal, 2), description="test")
    assert parts == near(whole)


def test_logits_are_held_for_a_chunk_of_positions_only():
    """The numbers are those of all positions at once; the largest logits are a chunk's."""
    model, sizes = tiny_llama(), []
    whole = evaluate_batches(model, [problem()], description="test")
    model.lm_head.register_forward_hook(lambda _head, _x, logits: sizes.append(len(logits)))
    chunked = evaluate_batches(model, [problem()], description="test", chunk_tokens=7)
    assert sizes == [7] * 6 + [6]
    assert chunked == near(whole)


def test_the_teacher_itself_is_at_no_distance():
    """Zero nats, every choice agreed on."""
    model = tiny_llama(seed=1)
    found = evaluate_batches(model, [problem()], description="test")
    assert abs(found["kl_nats"]) < 1e-6
    assert abs(found["kd_loss"]) < 1e-6
    assert found["top1_agreement"] == 1.0


def test_a_lazy_teacher_is_the_dense_one():
    """From its hidden states, or run on the batch itself; at all positions or without the last."""
    model, teacher = tiny_llama(), tiny_llama(seed=1)
    token_ids, signal = problem()
    dense = evaluate_batches(model, [(token_ids, signal)], description="test")
    hidden = hidden_states(teacher, token_ids)[:, :-1]
    flat = hidden.flatten(0, 1)
    of_hidden = LazyTeacher(signal.mask, lambda rows: logits_of(teacher, flat[rows]))
    for lazy in (of_hidden, live_teacher(teacher, token_ids, signal.mask)):
        found = evaluate_batches(model, [(token_ids, lazy)], description="test", chunk_tokens=5)
        assert found == near(dense)


def test_the_last_position_has_a_distance_and_no_label():
    """Where the mask spans whole blocks, perplexity is of the same tokens as without it."""
    model, teacher = tiny_llama(), tiny_llama(seed=1)
    token_ids, _ = problem()
    mask = torch.ones_like(token_ids, dtype=torch.bool)
    whole = evaluate_batches(
        model, [(token_ids, live_teacher(teacher, token_ids, mask))], description="test"
    )
    log_p, log_q = (m(token_ids).logits.log_softmax(-1) for m in (teacher, model))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert whole["kl_nats"] == pytest.approx(expected, rel=1e-5)
    assert whole["tokens"] == token_ids.numel()
    short = live_teacher(teacher, token_ids, mask[:, :-1])
    cut = evaluate_batches(model, [(token_ids, short)], description="test")
    assert whole["perplexity"] == pytest.approx(cut["perplexity"], rel=1e-6)


def test_logits_of_neither_side_are_held_for_a_batch(monkeypatch):
    """At a large vocabulary no tensor is larger than a chunk's logits."""
    vocab_size, chunk_bytes = 8192, kl.CHUNK_BYTES // 32  # of 262,144 in whole chunks
    monkeypatch.setattr(kl, "CHUNK_BYTES", chunk_bytes)
    model = tiny_llama(vocab_size=vocab_size, hidden_size=16, head_dim=4, intermediate_size=16)
    token_ids = torch.arange(4 * 32).view(4, 32)
    mask = torch.ones_like(token_ids, dtype=torch.bool)
    with torch.no_grad(), LargestTensor() as largest:
        lazy = live_teacher(model, token_ids, mask)
        found = evaluate_batches(model, [(token_ids, lazy)], description="test")
    assert abs(found["kl_nats"]) < 1e-6
    assert chunk_bytes / 2 < largest.num_bytes <= chunk_bytes < 4 * 32 * vocab_size * 4


def test_nothing_that_counts_has_no_numbers():
    """None, which JSON can hold; not NaN."""
    found = evaluate_batches(tiny_llama(), [problem(ratio=0.0)], description="test")
    assert found.pop("tokens") == 0
    assert set(found.values()) == {None}


def test_no_gradient_is_kept():
    """Evaluation inside a run costs no memory of activations."""
    model = tiny_llama().requires_grad_(True)
    evaluate_batches(model, [problem()], description="test")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_error_bar_is_that_of_repeated_draws():
    """Sequences drawn anew many times scatter by what one draw gives, to a tenth."""
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        level = 3 + 0.5 * torch.randn(count, generator=generator)  # tokens of a text go together
        tokens = torch.randint(20, 60, (count,), generator=generator).double()
        noise = torch.randn(count, generator=generator) * tokens.sqrt()
        return level * tokens + noise, tokens

    draws = [draw(50) for _ in range(400)]
    for estimate in (perplexity_of, mean_and_stderr):
        means, errors = zip(*(estimate(*one) for one in draws), strict=True)
        scatter = torch.tensor(means).std().item()
        assert sum(errors) / len(errors) == pytest.approx(scatter, rel=0.1)


def test_one_sequence_has_no_error_bar():
    """There is nothing to compare it with."""
    found = perplexity_of(torch.tensor([20.0]), torch.tensor([10.0]))
    assert found == (pytest.approx(math.exp(2)), None)


def test_equal_sequences_have_an_error_of_zero():
    """And a perplexity of their common level."""
    perplexity, stderr = perplexity_of(torch.tensor([20.0, 40.0]), torch.tensor([10.0, 20.0]))
    assert perplexity == pytest.approx(math.exp(2))
    assert stderr == pytest.approx(0.0, abs=1e-9)


def test_a_hopeless_student_still_has_a_number():
    """exp(10000) is no float; what is reported is finite."""
    perplexity, _ = perplexity_of(torch.tensor([1e6]), torch.tensor([100.0]))
    assert math.isfinite(perplexity)
