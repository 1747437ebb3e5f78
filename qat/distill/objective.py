"""The training loss: a divergence by name, and the chunked head that keeps its memory flat.

Logits of a chunk of positions are formed, their loss and its gradient taken at once, and dropped:
the backward pass only scales what the forward pass has found.

Shape legend: B batch, T positions, H hidden, V vocabulary, N = B * T.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from qat.distill.kl import (
    StudentLogits,
    confidence_kl,
    forward_kl,
    jensen_shannon,
    kd_loss,
    reverse_kl,
    skewed_kl,
)
from qat.distill.teacher import TeacherSignal

CHUNK_TOKENS = 256  # of 49k logits in float32: 50 MB at a time; as quick as 512, 25% slower at 128

Head = Callable[[Tensor, TeacherSignal], StudentLogits]
Divergence = Callable[[StudentLogits, TeacherSignal], Tensor]

DIVERGENCES: dict[str, Divergence] = {
    "forward-kl": forward_kl,
    "reverse-kl": reverse_kl,
    "jensen-shannon": jensen_shannon,
    "skewed-kl": skewed_kl,
    "confidence-kl": confidence_kl,
    "kd": kd_loss,
}


def make_divergence(name: str, *, temperature: float = 1.0) -> Divergence:
    """Return the loss of a position, by name.

    Args:
        name: One of `DIVERGENCES`.
        temperature: Divides both sides' logits; its square multiplies the loss, so that gradients
            keep their size (Hinton et al. 2015, section 2).

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"loss {name!r} is not one of {', '.join(DIVERGENCES)}")
    if name == "kd":
        return partial(kd_loss, temperature=temperature)
    if temperature != 1.0:
        return partial(tempered, DIVERGENCES[name], temperature)
    return DIVERGENCES[name]


def tempered(
    divergence: Divergence, temperature: float, student_logits: StudentLogits, signal: TeacherSignal
) -> Tensor:
    """Return a divergence at a temperature, times its square.

    Raises:
        ValueError: If the teacher is not known on the whole vocabulary: the tail's mass at another
            temperature cannot be told from its mass at one.
    """
    if signal.kind != "dense":
        raise ValueError(
            f"--temperature {temperature} needs every teacher logit, this cache is {signal.kind}; "
            "use --loss kd, or build the cache with --content hidden"
        )
    teacher = torch.log_softmax(signal.log_probs / temperature, -1)
    softened = replace(signal, log_probs=teacher)
    return divergence(student_logits.float() / temperature, softened) * temperature**2


class ChunkedLoss(torch.autograd.Function):
    """Mean divergence over counted positions, with the gradient found in the forward pass."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        head: Head,
        signal: TeacherSignal,
        divergence: Divergence,
        chunk_tokens: int,
    ) -> Tensor:
        """Return the scalar loss of hidden states (N, H)."""
        wants_gradient = ctx.needs_input_grad[0]
        count = signal.mask.sum().clamp_min(1)
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if wants_gradient else None
        for rows, part in signal.chunks(chunk_tokens):
            with torch.set_grad_enabled(wants_gradient):
                chunk = hidden[rows].detach().requires_grad_(wants_gradient)
                loss = (divergence(head(chunk, part), part) * part.mask).sum() / count
            total += loss.detach()
            if wants_gradient:
                gradient[rows] = torch.autograd.grad(loss, chunk)[0]
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Return the stored gradient, scaled."""
        return (ctx.gradient * upstream).to(ctx.gradient.dtype), None, None, None, None


def chunked_loss(
    hidden: Tensor,
    head: Head,
    signal: TeacherSignal,
    divergence: Divergence,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Return the mean divergence over counted positions, a float32 scalar.

    The head's own weights get no gradient: it stays as it is in every mode of training.

    Args:
        hidden: Final hidden states on the T predicted positions, (B, T, H).
        head: Makes logits (n, V), or those of candidate tokens, of hidden states (n, H) and the
            signal's n positions.
        signal: The teacher on the same positions.
        divergence: Makes (n,) nats of such logits and the signal's n positions.
        chunk_tokens: Positions at a time; bounds memory, does not change the result.
    """
    return ChunkedLoss.apply(hidden.flatten(0, 1), head, signal.flatten(), divergence, chunk_tokens)
