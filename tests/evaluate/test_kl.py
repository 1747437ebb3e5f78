import math

import pytest
import torch
from torch.nn import functional

from qat.distill.kl import forward_kl, kd_loss
from qat.distill.teacher import dense_signal, top_k_signal
from qat.evaluate.kl import evaluate_batches, perplexity_of
from tests.tiny import tiny_llama

DISTANCES = ("kl_nats", "kd_loss", "perplexity", "perplexity_stderr", "top1_agreement")


def problem(*, rows=6, length=9, ratio=0.7, top_k=None):
    """Return token ids and the word of another model on them."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(261, (rows, length), generator=generator)
    mask = torch.rand(rows, length - 1, generator=generator) < ratio
    logits = tiny_llama(seed=1)(token_ids).logits[:, :-1]
    signal = dense_signal(logits, mask) if top_k is None else top_k_signal(logits, mask, top_k)
    return token_ids, signal


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
    assert found["kl_nats"] == pytest.approx(forward_kl(logits, signal)[mask].mean().item(), 1e-5)
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
    assert parts == {name: pytest.approx(value, rel=1e-5) for name, value in whole.items()}


def test_logits_are_held_for_a_chunk_of_positions_only():
    """The numbers are those of all positions at once; the largest logits are a chunk's."""
    model, sizes = tiny_llama(), []
    whole = evaluate_batches(model, [problem()], description="test")
    model.lm_head.register_forward_hook(lambda _head, _x, logits: sizes.append(len(logits)))
    chunked = evaluate_batches(model, [problem()], description="test", chunk_tokens=7)
    assert sizes == [7] * 6 + [6]
    assert chunked == {name: pytest.approx(value, rel=1e-5) for name, value in whole.items()}


def test_the_teacher_itself_is_at_no_distance():
    """Zero nats, every choice agreed on."""
    model = tiny_llama(seed=1)
    found = evaluate_batches(model, [problem()], description="test")
    assert abs(found["kl_nats"]) < 1e-6
    assert abs(found["kd_loss"]) < 1e-6
    assert found["top1_agreement"] == 1.0


def test_nothing_that_counts_has_no_numbers():
    """None, which JSON can hold; not NaN."""
    found = evaluate_batches(tiny_llama(), [problem(ratio=0.0)], description="test")
    assert found == {**dict.fromkeys(DISTANCES), "tokens": 0}


def test_no_gradient_is_kept():
    """Evaluation inside a run costs no memory of activations."""
    model = tiny_llama().requires_grad_(True)
    evaluate_batches(model, [problem()], description="test")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_error_bar_is_that_of_repeated_draws():
    """Sequences drawn anew many times scatter by what one draw says, to a tenth."""
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        level = 3 + 0.5 * torch.randn(count, generator=generator)  # tokens of a text go together
        tokens = torch.randint(20, 60, (count,), generator=generator).double()
        noise = torch.randn(count, generator=generator) * tokens.sqrt()
        return (level * tokens + noise).tolist(), tokens.tolist()

    draws = [perplexity_of(*draw(50)) for _ in range(400)]
    scatter = torch.tensor([perplexity for perplexity, _ in draws]).std().item()
    claimed = sum(stderr for _, stderr in draws) / len(draws)
    assert claimed == pytest.approx(scatter, rel=0.1)


def test_one_sequence_has_no_error_bar():
    """There is nothing to compare it with."""
    assert perplexity_of([20.0], [10]) == (pytest.approx(math.exp(2)), None)


def test_equal_sequences_have_an_error_of_zero():
    """And a perplexity of their common level."""
    perplexity, stderr = perplexity_of([20.0, 40.0], [10, 20])
    assert perplexity == pytest.approx(math.exp(2))
    assert stderr == pytest.approx(0.0, abs=1e-9)


def test_a_hopeless_student_still_has_a_number():
    """exp(10000) is no float; what is reported is finite."""
    perplexity, _ = perplexity_of([1e6], [100])
    assert math.isfinite(perplexity)
