import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from qat.distill.kl import (
    confidence_kl,
    forward_kl,
    hard_top1,
    jensen_shannon,
    kd_loss,
    reverse_kl,
    skewed_kl,
)
from qat.distill.teacher import TeacherSignal, dense_signal, top_k_signal

V = 23
ALL = (forward_kl, reverse_kl, jensen_shannon, skewed_kl, confidence_kl)
COARSE = (forward_kl, reverse_kl, jensen_shannon, skewed_kl)


def logits(seed, spread=3.0):
    return spread * torch.randn(2, 5, V, generator=torch.Generator().manual_seed(seed))


def signal_of(kind, teacher, top_k=6):
    """Return a teacher signal of one kind."""
    mask = torch.ones(teacher.shape[:-1], dtype=torch.bool)
    if kind == "dense":
        return dense_signal(teacher, mask)
    signal = top_k_signal(teacher, mask, top_k)
    if kind == "top-k":
        return signal
    inside = signal.log_probs.log_softmax(-1)
    return TeacherSignal(
        kind="conditional", log_probs=inside, mask=mask, token_ids=signal.token_ids
    )


def plain_kl(left, right):
    """Return KL(left || right) of logits by torch's own function."""
    left, right = left.log_softmax(-1), right.log_softmax(-1)
    return functional.kl_div(right, left, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("spread", [0.1, 3.0, 15.0])
def test_dense_divergences_are_torchs_own(spread):
    """Forward and reverse against functional.kl_div, the mixtures against their definitions."""
    student, teacher = logits(1, spread), logits(2, spread)
    signal = signal_of("dense", teacher)
    close = {"rtol": 1e-4, "atol": 2e-5}
    assert torch.allclose(forward_kl(student, signal), plain_kl(teacher, student), **close)
    assert torch.allclose(reverse_kl(student, signal), plain_kl(student, teacher), **close)
    p, q = teacher.softmax(-1), student.softmax(-1)
    mixture = ((p + q) / 2).log()
    expected = (plain_kl(teacher, mixture) + plain_kl(student, mixture)) / 2
    assert torch.allclose(jensen_shannon(student, signal), expected, **close)
    expected = plain_kl(teacher, (0.1 * p + 0.9 * q).log())
    assert torch.allclose(skewed_kl(student, signal), expected, **close)


@pytest.mark.parametrize("divergence", ALL)
def test_all_tokens_kept_is_the_dense_divergence(divergence):
    """Sparse with K = V equals dense: the cell for the rest is empty."""
    student, teacher = logits(1), logits(2)
    sparse = divergence(student, signal_of("top-k", teacher, V))
    assert torch.allclose(sparse, divergence(student, signal_of("dense", teacher)), atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(
    top_k=st.integers(1, V),
    seed=st.integers(0, 999),
    spread=st.sampled_from([0.3, 2.0, 8.0, 20.0]),
    divergence=st.sampled_from(COARSE),
)
def test_the_top_k_give_a_lower_bound(top_k, seed, spread, divergence):
    """Merging cells never adds divergence (data processing), also for a teacher that is sure."""
    student, teacher = logits(seed, spread), logits(seed + 1000, spread)
    signal = signal_of("top-k", teacher, top_k)
    coarse = divergence(student, signal)
    full = divergence(student, signal_of("dense", teacher))
    assert (coarse >= -1e-5).all()
    if divergence is reverse_kl and top_k < V:  # it divides by a tail that must be resolved
        resolved = signal.log_tail.exp() > 1e-4
        coarse, full = coarse[resolved], full[resolved]
    assert (coarse <= full + 1e-4 + 1e-3 * full).all()


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("kind", ["dense", "top-k", "conditional"])
@pytest.mark.parametrize("spread", [0.5, 4.0, 30.0])
def test_a_perfect_student_is_at_zero(divergence, kind, spread):
    """Whatever the teacher's mass outside its K tokens; logits count up to a constant."""
    teacher = logits(3, spread)
    distance = divergence(teacher + 7.0, signal_of(kind, teacher))
    assert distance.abs().max() < 2e-5


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("kind", ["dense", "top-k", "conditional"])
def test_the_gradient_at_a_perfect_student_is_zero(divergence, kind):
    """The minimum is a minimum."""
    teacher = logits(4)
    student = teacher.clone().requires_grad_()
    divergence(student, signal_of(kind, teacher)).sum().backward()
    assert student.grad.abs().max() < 2e-5


@pytest.mark.parametrize("divergence", [*ALL, kd_loss])
@pytest.mark.parametrize("kind", ["dense", "top-k", "conditional"])
def test_values_and_gradients_stay_finite(divergence, kind):
    """A student that is sure of the wrong token, a teacher that is sure, huge logits."""
    teacher, student = logits(5, 60.0), logits(6, 60.0).requires_grad_()
    loss = divergence(student, signal_of(kind, teacher))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(student.grad).all()


def test_conditional_kl_is_that_of_the_kept_tokens_alone():
    """A cache without the tail's mass: both sides are renormalized over its ids."""
    student, teacher = logits(1), logits(2)
    signal = signal_of("conditional", teacher)
    ids = signal.token_ids
    expected = plain_kl(teacher.gather(-1, ids), student.gather(-1, ids))
    assert torch.allclose(forward_kl(student, signal), expected, atol=1e-5)


def test_drawn_tokens_estimate_the_dense_divergence_without_bias():
    """The mean over many draws is the full KL, within three standard errors."""
    student, teacher = logits(1)[0, :1], logits(2)[0, :1]
    log_probs = teacher.log_softmax(-1)
    count, draws = 4000, 6
    generator = torch.Generator().manual_seed(0)
    ids = torch.multinomial(
        log_probs.exp().expand(count, V), draws, replacement=True, generator=generator
    )
    signal = TeacherSignal(
        kind="sampled",
        log_probs=log_probs.expand(count, V).gather(-1, ids),
        mask=torch.ones(count, dtype=torch.bool),
        token_ids=ids,
        weights=torch.full((count, draws), 1 / draws),
    )
    estimates = forward_kl(student.expand(count, V), signal)
    exact = plain_kl(teacher, student).item()
    assert estimates.mean().item() == pytest.approx(
        exact, abs=3 * estimates.std().item() / math.sqrt(count)
    )


@pytest.mark.parametrize("divergence", ALL[1:])
def test_draws_of_the_teacher_serve_forward_kl_only(divergence):
    """Anything else would be biased; the remedy is named."""
    signal = TeacherSignal(
        kind="sampled",
        log_probs=torch.zeros(1, 1),
        mask=torch.ones(1, dtype=torch.bool),
        token_ids=torch.zeros(1, 1, dtype=torch.int64),
        weights=torch.ones(1, 1),
    )
    with pytest.raises(ValueError, match="use --loss forward-kl, or a top-k or hidden cache"):
        divergence(torch.zeros(1, V), signal)


def test_jensen_shannon_is_symmetric_and_at_most_ln_2():
    """Swapping teacher and student changes nothing."""
    left, right = logits(1, 20.0), logits(2, 20.0)
    distance = jensen_shannon(left, signal_of("dense", right))
    assert torch.allclose(distance, jensen_shannon(right, signal_of("dense", left)), atol=1e-5)
    assert (distance <= math.log(2) + 1e-5).all()


def test_skewed_kl_is_bounded():
    """By -log of the teacher's share of the mixture, however wrong the student is."""
    distance = skewed_kl(logits(1, 60.0), signal_of("dense", logits(2, 60.0)))
    assert (distance <= -math.log(0.1) + 1e-4).all()


def test_confidence_goes_from_forward_to_reverse():
    """A teacher that is sure gives reverse KL, one that knows nothing nearly forward KL."""
    student = logits(1)
    sure = torch.zeros(2, 5, V)
    sure[..., 3] = 40.0
    signal = signal_of("dense", sure)
    assert torch.allclose(confidence_kl(student, signal), reverse_kl(student, signal), rtol=1e-4)
    signal = signal_of("dense", torch.zeros(2, 5, V))
    forward, reverse = forward_kl(student, signal), reverse_kl(student, signal)
    expected = (1 - 1 / V) * forward + reverse / V
    assert torch.allclose(confidence_kl(student, signal), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "top-k", "conditional"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kd_loss_is_the_seeds_number(kind, temperature):
    """T^2 KL of both softmaxes at temperature T over the K ids: nothing outside them counts."""
    student, teacher = logits(1), logits(2)
    signal = signal_of(kind, teacher)
    ids = torch.arange(V).expand(2, 5, V) if signal.token_ids is None else signal.token_ids
    expected = temperature**2 * plain_kl(
        teacher.gather(-1, ids) / temperature, student.gather(-1, ids) / temperature
    )
    assert torch.allclose(kd_loss(student, signal, temperature=temperature), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "top-k", "conditional"])
def test_hard_top1_is_cross_entropy_on_the_teachers_choice(kind):
    """The same token, in whichever form the teacher is known."""
    student, teacher = logits(1), logits(2)
    expected = functional.cross_entropy(
        student.flatten(0, 1), teacher.argmax(-1).flatten(), reduction="none"
    )
    found = hard_top1(student, signal_of(kind, teacher))
    assert torch.allclose(found.flatten(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_read_in_float32(dtype):
    """The sums over a vocabulary are never taken in 8 bits of precision."""
    student, signal = logits(1).to(dtype), signal_of("top-k", logits(2))
    assert torch.equal(forward_kl(student, signal), forward_kl(student.float(), signal))
