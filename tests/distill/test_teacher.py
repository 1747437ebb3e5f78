import pytest
import torch

from qat.distill.kl import hard_top1
from qat.distill.teacher import TeacherSignal, dense_signal, log_rest, text_signal, top_k_signal

LOGITS = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0)) * 3
MASK = torch.tensor([[True, False, True], [True, True, False]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_signal_is_the_log_softmax(dtype):
    """In float32 whatever the teacher computed in."""
    signal = dense_signal(LOGITS.to(dtype), MASK)
    assert signal.kind == "dense"
    assert signal.log_probs.dtype == torch.float32
    assert torch.equal(signal.log_probs, LOGITS.to(dtype).float().log_softmax(-1))


@pytest.mark.parametrize("top_k", [1, 5, 20])
def test_the_top_k_keep_their_true_probabilities(top_k):
    """Not renormalized: kept mass and tail make one; the ids are those of the largest."""
    signal = top_k_signal(LOGITS, MASK, top_k)
    probs = LOGITS.softmax(-1)
    assert torch.equal(signal.token_ids, probs.argsort(-1, descending=True)[..., :top_k])
    assert torch.allclose(signal.log_probs.exp(), probs.gather(-1, signal.token_ids), atol=1e-6)
    total = signal.log_probs.exp().sum(-1) + signal.log_tail.exp()
    assert torch.allclose(total, torch.ones(2, 3), atol=1e-6)
    assert torch.isfinite(signal.log_tail).all()


@pytest.mark.parametrize("top_k", [0, 21, -1])
def test_more_ids_than_there_are_is_refused(top_k):
    """With the vocabulary's size."""
    with pytest.raises(ValueError, match=rf"top-k {top_k} is outside 1\.\.20 \(the vocabulary\)"):
        top_k_signal(LOGITS, MASK, top_k)


def test_the_rest_is_finite_where_nothing_is_left():
    """Sums that reach one, or pass it by rounding, leave next to nothing instead of NaN."""
    log_probs = torch.tensor([[0.5, 0.25], [0.5, 0.5], [0.5, 0.5000001]]).log()
    rest = log_rest(log_probs)
    assert rest[0].exp() == pytest.approx(0.25)
    assert torch.isfinite(rest).all()
    assert (rest[1:].exp() <= 1e-6).all()


def test_changing_a_signal_leaves_what_is_no_tensor():
    """map, flatten and to keep the kind, and None stays None."""
    signal = top_k_signal(LOGITS, MASK, 4)
    flat = signal.flatten()
    assert flat.kind == "top-k"
    assert flat.weights is None
    assert flat.log_probs.shape == flat.token_ids.shape == (6, 4)
    assert flat.mask.shape == flat.log_tail.shape == (6,)
    moved = signal.to("cpu")
    assert isinstance(moved, TeacherSignal)
    assert torch.equal(moved.log_probs, signal.log_probs)


def test_a_text_is_a_teacher_that_knows_the_next_token():
    """Cross-entropy on its likeliest token is torch's own, on labels shifted by one."""
    token_ids = torch.randint(20, (2, 4), generator=torch.Generator().manual_seed(1))
    signal = text_signal(token_ids, MASK)
    found = hard_top1(LOGITS, signal)
    expected = torch.nn.functional.cross_entropy(
        LOGITS.flatten(0, 1), token_ids[:, 1:].flatten(), reduction="none"
    )
    assert torch.allclose(found.flatten(), expected, atol=1e-6)
