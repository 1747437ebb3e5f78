import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.cache.codec import (
    as_half,
    draw_systematic,
    largest,
    normalize,
    pack_hidden,
    pack_negatives,
    pack_sampled,
    pack_top_k,
    unpack,
    unpack_hidden,
    usual_size,
)

B, T, V = 2, 3, 96


def random_logits(vocab_size=V, *, spread=3.0):
    return torch.randn(B, T, vocab_size) * spread


def mask():
    return torch.ones(B, T, dtype=torch.bool)


def exact_kl(teacher_logits, student_logits):
    """KL(teacher, student) of each position, by its definition."""
    p, q = teacher_logits.double().softmax(-1), student_logits.double().softmax(-1)
    return (p * (p / q).log()).sum(-1)


def bucket_kl(signal, student_logits):
    """KL of each position over the K ids and one cell for the rest, by its definition."""
    q = student_logits.double().softmax(-1).gather(-1, signal.token_ids)
    p, p_rest = signal.log_probs.double().exp(), signal.log_tail.double().exp()
    q_rest = (1 - q.sum(-1)).clamp_min(1e-300)
    tail = torch.where(p_rest > 1e-20, p_rest * (p_rest / q_rest).log(), 0)
    return (p * (p / q).log()).sum(-1) + tail


def sampled_kl(signal, student_logits):
    """The estimate that the weights make, by its definition."""
    log_q = student_logits.double().log_softmax(-1).gather(-1, signal.token_ids)
    return (signal.weights.double() * (signal.log_probs.double() - log_q)).sum(-1)


@given(
    vocab_size=st.sampled_from([7, 64, 96, 128, 272, 640, 1000]),
    top_k=st.integers(1, 7),
    ties=st.booleans(),
)
@settings(deadline=None)
def test_the_quick_search_finds_the_largest(vocab_size, top_k, ties):
    """Same values as torch's search of the whole row, and ids that hold them."""
    values = torch.randn(5, vocab_size)
    if ties:
        values = values.round()
    found, token_ids = largest(values, top_k)
    assert torch.equal(found, values.topk(top_k).values)
    assert torch.equal(values.gather(1, token_ids), found)
    assert all(len(set(row)) == top_k for row in token_ids.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_keeps_true_probabilities(dtype):
    """Each kept id has its probability under the whole softmax, and all sum to one."""
    logits = random_logits().to(dtype)
    signal = unpack(pack_top_k(logits, 8), mask())
    truth = logits.float().softmax(-1)
    kept = signal.log_probs.exp()
    torch.testing.assert_close(kept, truth.gather(-1, signal.token_ids), rtol=5e-3, atol=1e-6)
    torch.testing.assert_close(kept.sum(-1) + signal.log_tail.exp(), torch.ones(B, T))
    assert torch.equal(signal.token_ids[..., 0], logits.argmax(-1))


def test_top_k_is_a_lower_bound_that_reaches_equality():
    """More ids never lower the divergence (data processing), and K = V gives it exactly."""
    teacher, student = random_logits(), random_logits()
    truth = exact_kl(teacher, student)
    bounds = [
        bucket_kl(unpack(pack_top_k(teacher, top_k), mask()), student)
        for top_k in (1, 4, 16, 64, V)
    ]
    for smaller, larger in zip(bounds, bounds[1:], strict=False):
        assert (smaller <= larger + 2e-3 * truth).all()
    assert (bounds[0] < truth).all()
    torch.testing.assert_close(bounds[-1], truth, rtol=2e-3, atol=1e-3)


def test_a_perfect_student_scores_zero():
    """Float16 rounding of the cache costs less than 1e-5 nats."""
    teacher = torch.randn(16, 32, V) * 3
    signal = unpack(pack_top_k(teacher, 16), torch.ones(16, 32, dtype=torch.bool))
    divergence = bucket_kl(signal, teacher)
    assert (divergence > -1e-6).all()  # float32
    assert divergence.mean() < 1e-5


@pytest.mark.recipe
def test_sampled_draws_have_no_bias():
    """Over many seeds the estimate's mean is the exact divergence, within four errors."""
    teacher, student = random_logits(spread=1.5), random_logits(spread=1.5)
    truth = exact_kl(teacher, student)
    estimates = torch.stack(
        [
            sampled_kl(unpack(pack_sampled(teacher, 4, torch.rand(B, T), 6), mask()), student)
            for _ in range(2000)
        ]
    )
    error = estimates.std(0) / len(estimates) ** 0.5
    assert ((estimates.mean(0) - truth).abs() < 4 * error + 1e-3 * truth).all()
    assert (error < 0.05 * truth).all()


def test_sampled_weights_sum_to_one():
    """The estimate of a constant is that constant."""
    signal = unpack(pack_sampled(random_logits(), 4, torch.rand(B, T), 6), mask())
    torch.testing.assert_close(signal.weights.sum(-1), torch.ones(B, T))
    assert signal.weights.shape == signal.token_ids.shape == (B, T, 10)


@pytest.mark.recipe
@given(vocab_size=st.sampled_from([5, 64, 96, 640]), num_draws=st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_draws_are_as_frequent_as_they_are_likely(vocab_size, num_draws):
    """Over offsets spread evenly, each id is drawn in proportion to its mass, zero included."""
    mass = torch.rand(vocab_size).square()
    mass[:2] = 0
    offsets = (torch.arange(4000) + 0.5) / 4000
    drawn, total = draw_systematic(mass.expand(4000, -1), offsets, num_draws)
    counts = torch.bincount(drawn.flatten(), minlength=vocab_size).double()
    assert counts[:2].sum() == 0
    torch.testing.assert_close(total[0, 0], mass.sum())
    torch.testing.assert_close(
        counts / counts.sum(), (mass / mass.sum()).double(), atol=2e-3, rtol=0
    )


def test_a_teacher_that_is_certain_gives_finite_fields():
    """No infinity and no NaN where all mass lies on one id."""
    logits = torch.full((1, 1, V), -1e4)
    logits[..., 5] = 1e4
    for fields in (pack_top_k(logits, 4), pack_sampled(logits, 4, torch.rand(1, 1), 6)):
        signal = unpack(fields, torch.ones(1, 1, dtype=torch.bool))
        for tensor in (signal.log_probs, signal.weights, signal.log_tail):
            assert tensor is None or tensor.isfinite().all()
        assert signal.token_ids[0, 0, 0] == 5
        torch.testing.assert_close(signal.log_probs[0, 0, 0].exp(), torch.tensor(1.0))


def test_negatives_keep_the_true_log_probability():
    """Of any id, by the whole softmax."""
    logits, ids = random_logits(), torch.randint(V, (B, T, 5))
    fields = pack_negatives(logits, ids)
    truth = logits.log_softmax(-1).gather(-1, ids)
    assert torch.equal(fields["negative_ids"], ids)
    torch.testing.assert_close(fields["negative_log_probs"].float(), truth, atol=1e-2, rtol=0)


def test_hidden_states_come_back_within_one_percent_of_the_divergence():
    """Also where a few channels are tens of times larger than the rest, as after a last norm."""
    width = 64
    hidden = torch.randn(8, 32, width) * torch.linspace(-1, 1, width).mul(3).exp()
    head = torch.randn(V, width) / hidden.square().mean().sqrt() / width**0.5 * 3
    student = (hidden + 0.3 * hidden.std() * torch.randn_like(hidden)) @ head.T
    scale = usual_size(hidden[:2])
    back = unpack_hidden(pack_hidden(hidden, scale), scale)
    truth = exact_kl(hidden @ head.T, student).mean()
    assert (exact_kl(back @ head.T, student).mean() / truth - 1).abs() < 0.01
    assert exact_kl(hidden @ head.T, back @ head.T).mean() < 1e-3


def test_hidden_zero_stays_zero():
    """A silent position is no division by zero."""
    scale = usual_size(torch.zeros(1, 1, 64))
    back = unpack_hidden(pack_hidden(torch.zeros(1, 1, 64), scale), scale)
    assert torch.equal(back, torch.zeros(1, 1, 64))


def test_normalizing_twice_changes_nothing():
    """Masses sum to one after the first time."""
    once = normalize(torch.randn(B, T, 5), torch.randn(B, T))
    twice = normalize(*once)
    torch.testing.assert_close(once, twice)


def test_half_is_never_infinite():
    """The lowest log-probability stands for everything below it."""
    assert as_half(torch.tensor([float("-inf"), -1e9, -3.0])).isfinite().all()
