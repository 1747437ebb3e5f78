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

from qat.distill import kl
from qat.distill.teacher import TeacherSignal

CHUNK_TOKENS = 256  # of 49k logits in float32: 50 MB at a time; as quick as 512, 25% slower at 128

Head = Callable[[Tensor, TeacherSignal], kl.StudentLogits]
Divergence = Callable[[kl.StudentLogits, TeacherSignal], Tensor]

DIVERGENCES: dict[str, Divergence] = {
    "forward-kl": kl.forward_kl,
    "reverse-kl": kl.reverse_kl,
    "jensen-shannon": kl.jensen_shannon,
    "skewed-kl": kl.skewed_kl,
    "confidence-kl": kl.confidence_kl,
    "kd": kl.kd_loss,
}

TEXT_LOSS = "cross-entropy"  # of next-token prediction: its teacher is `text_signal`


def make_divergence(name: str, *, temperature: float = 1.0) -> Divergence:
    """Return the loss of a position, by its name in `DIVERGENCES`, or that of the text itself.

    A temperature divides both sides' logits; its square multiplies the loss, so that gradients
    keep their size (Hinton et al. 2015, section 2).
    """
    if name == TEXT_LOSS:
        return kl.hard_top1
    if name not in DIVERGENCES:
        raise ValueError(f"loss {name!r} is not one of {', '.join((*DIVERGENCES, TEXT_LOSS))}")
    if name == "kd":
        return partial(kl.kd_loss, temperature=temperature)
    if temperature != 1.0:
        return partial(tempered, DIVERGENCES[name], temperature)
    return DIVERGENCES[name]


def tempered(
    divergence: Divergence,
    temperature: float,
    student_logits: kl.StudentLogits,
    signal: TeacherSignal,
) -> Tensor:
    """Return a divergence at a temperature, times its square.

    The teacher is known on the whole vocabulary: the tail's mass at another temperature cannot be
    told from its mass at one.
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
    """Mean divergence over counted positions, with the gradients found in the forward pass."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        head_weight: Tensor | None,
        head: Head,
        signal: TeacherSignal,
        divergence: Divergence,
        chunk_tokens: int,
    ) -> Tensor:
        """Return the scalar loss of hidden states (N, H)."""
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        count = signal.mask.sum().clamp_min(1)
        total = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Chunks add up in float32: a head's rows get one small gradient from each.
        d_head = torch.zeros_like(head_weight, dtype=torch.float32) if wants_head else None
        for rows, part in signal.chunks(chunk_tokens):
            with torch.set_grad_enabled(wants_hidden or wants_head):
                chunk = hidden[rows].detach().requires_grad_(wants_hidden)
                loss = (divergence(head(chunk, part), part) * part.mask).sum() / count
            total += loss.detach()
            sources = [chunk] * wants_hidden + [head_weight] * wants_head
            gradients = list(torch.autograd.grad(loss, sources)) if sources else []
            if wants_head:
                d_head += gradients.pop()
            if wants_hidden:
                d_hidden[rows] = gradients.pop()
        ctx.gradients = (d_hidden, d_head)
        ctx.dtypes = (hidden.dtype, head_weight.dtype if wants_head else None)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the stored gradients, scaled."""
        gradients = [
            None if gradient is None else (gradient * upstream).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None, None


def chunked_loss(
    hidden: Tensor,
    head: Head,
    signal: TeacherSignal,
    divergence: Divergence,
    *,
    head_weight: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Return the mean divergence over counted positions, a float32 scalar.

    Args:
        hidden: Final hidden states on the T predicted positions, (B, T, H).
        head: Makes logits (n, V), or those of candidate tokens, of hidden states (n, H) and the
            signal's n positions.
        signal: The teacher on the same positions.
        divergence: Makes (n,) nats of such logits and the signal's n positions.
        head_weight: Leaf that `head` computes with, (V, H), where it trains; it gets its gradient.
        chunk_tokens: Positions at a time; bounds memory, does not change the result.
    """
    return ChunkedLoss.apply(
        hidden.flatten(0, 1), head_weight, head, signal.flatten(), divergence, chunk_tokens
    )
