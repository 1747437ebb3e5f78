import math

import pytest
import torch

from qat.distill.candidates import candidate_logits, draw_negatives, repeats, with_negatives
from qat.distill.kl import (
    confidence_kl,
    forward_kl,
    hard_top1,
    jensen_shannon,
    kd_loss,
    reverse_kl,
    skewed_kl,
)
from qat.distill.teacher import TeacherSignal, top_k_signal

N, V, K = 6, 37, 5
LOSSES = (
    *(forward_kl, reverse_kl, jensen_shannon, skewed_kl, confidence_kl),
    *(kd_loss, hard_top1),
)
OF_DRAWS = (forward_kl, kd_loss, hard_top1)  # a sampled teacher gives expectations only


def student_logits(seed=1):
    return 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))


def signal_of(kind):
    """Return a teacher signal on N positions; a sampled one has some of its draws twice."""
    teacher = 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(2))
    signal = top_k_signal(teacher, torch.ones(N, dtype=torch.bool), K)
    if kind == "top-k":
        return signal
    if kind == "conditional":
        inside = signal.log_probs.log_softmax(-1)
        return TeacherSignal(
            kind=kind, log_probs=inside, mask=signal.mask, token_ids=signal.token_ids
        )
    log_probs = teacher.log_softmax(-1)
    draws = log_probs.topk(K + 2, dim=-1).indices[:, [K, K + 1, K, K]]  # (N, 4)
    share = (signal.log_tail.exp() / 4).unsqueeze(-1).expand(-1, 4)
    return TeacherSignal(
        kind="sampled",
        log_probs=torch.cat([signal.log_probs, log_probs.gather(-1, draws)], -1),
        mask=signal.mask,
        token_ids=torch.cat([signal.token_ids, draws], -1),
        weights=torch.cat([signal.log_probs.exp(), share], -1),
    )


def candidates_of(logits, signal, num_negatives, seed=0):
    """Return what a loss sees of logits when so many negatives are drawn."""
    signal = with_negatives(signal, draw_negatives(seed, 0, V, num_negatives))
    negatives = logits[:, signal.negative_ids[0]]
    return candidate_logits(signal, logits.gather(-1, signal.token_ids), negatives, V)


@pytest.mark.parametrize(
    ("kind", "loss"),
    [(kind, loss) for kind in ("top-k", "conditional") for loss in LOSSES]
    + [("sampled", loss) for loss in OF_DRAWS],
)
def test_all_tokens_as_candidates_are_the_dense_loss(kind, loss):
    """R = V: the same value and the same gradient, whichever way the loss is formed."""
    signal = signal_of(kind)
    found, expected = student_logits().requires_grad_(), student_logits().requires_grad_()
    value = loss(candidates_of(found, signal, V), signal)
    dense = loss(expected, signal)
    assert torch.allclose(value, dense, rtol=1e-5, atol=1e-5)
    value.sum().backward()
    dense.sum().backward()
    assert torch.allclose(found.grad, expected.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.recipe
@pytest.mark.parametrize("kind", ["top-k", "sampled"])
def test_the_partition_has_no_bias(kind):
    """Over many draws its mean is the sum over the vocabulary, within four standard errors."""
    logits, signal = student_logits(), signal_of(kind)
    found = torch.stack(
        [candidates_of(logits, signal, 7, seed).log_partition[:, 0].exp() for seed in range(1000)]
    )
    exact = logits.exp().sum(-1)
    error = found.std(0) / math.sqrt(len(found))
    assert (found.std(0) > 0).all()
    assert ((found.mean(0) - exact).abs() < 4 * error).all()


@pytest.mark.recipe
def test_more_negatives_are_nearer():
    """The spread of the estimate falls with R, to nothing at R = V."""
    logits, signal = student_logits(), signal_of("top-k")
    exact = logits.logsumexp(-1, keepdim=True)
    errors = [
        torch.stack(
            [candidates_of(logits, signal, r, s).log_partition - exact for s in range(200)]
        ).std()
        for r in (2, 8, 24, V)
    ]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-6


def test_draws_follow_from_seed_and_number():
    """A resumed run draws the same; another batch or seed draws other tokens; none comes twice."""
    drawn = draw_negatives(3, 7, 1000, 64)
    assert torch.equal(drawn, draw_negatives(3, 7, 1000, 64))
    assert not torch.equal(drawn, draw_negatives(3, 8, 1000, 64))
    assert not torch.equal(drawn, draw_negatives(4, 7, 1000, 64))
    assert len(drawn.unique()) == 64
    assert len(draw_negatives(0, 0, 10, 64)) == 10


@pytest.mark.recipe
def test_every_token_is_as_likely_to_be_drawn():
    """R / V each, within four standard errors: the weights of the estimate rest on it."""
    counts = torch.zeros(20)
    for number in range(4000):
        counts[draw_negatives(0, number, 20, 5)] += 1
    share, error = 5 / 20, math.sqrt(0.25 * 0.75 / 4000)
    assert ((counts / 4000 - share).abs() < 4 * error).all()


def test_negatives_travel_with_the_signal():
    """Cut, flattened or moved, every position asks for the same tokens; none is copied."""
    mask = torch.ones(2, 6, dtype=torch.bool)
    signal = top_k_signal(torch.randn(2, 6, V), mask, K)
    drawn = draw_negatives(0, 0, V, 9)
    cut = with_negatives(signal, drawn).map(lambda tensor: tensor[:, :4]).flatten()
    assert cut.negative_ids.shape == (8, 9)
    assert (cut.negative_ids == drawn).all()
    assert cut.negative_ids.untyped_storage().nbytes() == drawn.untyped_storage().nbytes()


def test_repeats_are_all_but_the_first():
    """By a double loop."""
    token_ids = torch.randint(4, (5, 6))
    expected = [[ids[k] in ids[:k] for k in range(6)] for ids in token_ids.tolist()]
    assert repeats(token_ids).tolist() == expected
