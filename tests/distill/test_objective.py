import pytest
import torch
from torch import nn

from qat.distill.kl import forward_kl, kd_loss, reverse_kl
from qat.distill.objective import DIVERGENCES, chunked_loss, make_divergence
from qat.distill.teacher import dense_signal, top_k_signal

B, T, H, V = 3, 7, 8, 31


class Head(nn.Linear):
    """All logits, whatever the signal asks for."""

    def forward(self, hidden, _signal=None):
        return super().forward(hidden)


def problem(*, all_masked=False):
    """Return hidden states, a head and a signal with some positions that do not count."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, H, generator=generator)
    head = Head(H, V, bias=False)
    head.weight.data = torch.randn(V, H, generator=generator)
    mask = torch.rand(B, T, generator=generator) < (0.0 if all_masked else 0.7)
    teacher = 3 * torch.randn(B, T, V, generator=generator)
    return hidden, head.requires_grad_(False), top_k_signal(teacher, mask, 5)


def loss_and_gradient(loss_of, hidden):
    """Return a loss and its gradient in the hidden states."""
    hidden = hidden.clone().requires_grad_()
    loss = loss_of(hidden)
    loss.backward()
    return loss.detach(), hidden.grad


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, kd_loss])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 21, 1000])
def test_chunks_change_nothing(divergence, chunk_tokens):
    """The loss is the plain mean over counted positions, its gradient that of autograd."""
    hidden, head, signal = problem()

    def chunked(hidden):
        return chunked_loss(hidden, head, signal, divergence, chunk_tokens=chunk_tokens)

    loss, gradient = loss_and_gradient(chunked, hidden)
    plain, expected = loss_and_gradient(
        lambda hidden: divergence(head(hidden), signal)[signal.mask].mean(), hidden
    )
    assert torch.allclose(loss, plain, rtol=1e-6, atol=0)
    assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    assert (gradient[~signal.mask] == 0).all()


def test_the_gradient_scales_with_what_comes_back():
    """A loss that is weighted afterwards, as micro-batches are."""
    hidden, head, signal = problem()
    _, once = loss_and_gradient(lambda h: chunked_loss(h, head, signal, forward_kl), hidden)
    _, third = loss_and_gradient(lambda h: chunked_loss(h, head, signal, forward_kl) / 3, hidden)
    assert torch.allclose(third, once / 3, rtol=1e-6)


def test_without_gradients_it_is_a_number():
    """Under no_grad nothing is kept, and the value is the same."""
    hidden, head, signal = problem()
    with torch.no_grad():
        loss = chunked_loss(hidden, head, signal, forward_kl, chunk_tokens=4)
    assert not loss.requires_grad
    assert loss == chunked_loss(hidden, head, signal, forward_kl, chunk_tokens=4)


def test_nothing_that_counts_is_a_loss_of_zero():
    """Not NaN, and no gradient: a batch of padding does no harm."""
    hidden, head, signal = problem(all_masked=True)
    loss, gradient = loss_and_gradient(lambda h: chunked_loss(h, head, signal, forward_kl), hidden)
    assert loss == 0
    assert (gradient == 0).all()


def test_logits_of_one_chunk_exist_at_a_time():
    """The reason for chunks: the head never sees more positions than asked for."""
    hidden, head, signal = problem()
    seen = []

    def watched(part, signal):
        seen.append(len(part))
        assert len(signal.mask) == len(part)
        return head(part)

    chunked_loss(hidden.requires_grad_(), watched, signal, forward_kl, chunk_tokens=4)
    assert max(seen) == 4
    assert sum(seen) == B * T


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_has_the_dtype_of_the_hidden_states(dtype):
    """Compute dtypes pass through."""
    hidden, head, signal = problem()
    head = head.to(dtype)
    _, gradient = loss_and_gradient(
        lambda h: chunked_loss(h, head, signal, forward_kl), hidden.to(dtype)
    )
    assert gradient.dtype == dtype


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_name_is_a_loss_of_positions(name):
    """The choices of --loss."""
    hidden, head, signal = problem()
    values = make_divergence(name)(head(hidden), signal)
    assert values.shape == (B, T)
    assert (values >= -1e-5).all()


def test_an_unknown_name_is_refused_with_the_choices():
    """One line."""
    with pytest.raises(ValueError, match="loss 'kl' is not one of forward-kl, reverse-kl"):
        make_divergence("kl")


def test_a_temperature_softens_both_sides_and_keeps_gradients_their_size():
    """T^2 times the divergence of logits / T; at T = 1 the very same function."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 3, V, generator=generator), torch.randn(2, 3, V)
    mask = torch.ones(2, 3, dtype=torch.bool)
    softened = make_divergence("forward-kl", temperature=3.0)(student, dense_signal(teacher, mask))
    expected = 9 * forward_kl(student / 3, dense_signal(teacher / 3, mask))
    assert torch.allclose(softened, expected, atol=1e-5)
    assert make_divergence("forward-kl", temperature=1.0) is forward_kl


def test_a_temperature_needs_every_logit():
    """The tail's mass at another temperature is not known from its mass at one."""
    hidden, head, signal = problem()
    with pytest.raises(ValueError, match=r"--temperature 2.0 needs every teacher logit.*--loss kd"):
        make_divergence("forward-kl", temperature=2.0)(head(hidden), signal)
    make_divergence("kd", temperature=2.0)(head(hidden), signal)
