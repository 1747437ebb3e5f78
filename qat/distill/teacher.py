"""Teacher log-probabilities on each position, in one form for every source of it.

Shape legend: B batch, T positions, K tokens the teacher is known on, V vocabulary.
Position t of a block predicts token t + 1, so a block of L tokens has T = L - 1 positions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

LEAST_REST = 1e-7  # float32 cannot tell one minus less from one; the same for both sides of a KL

SignalKind = Literal["dense", "top-k", "sampled", "conditional"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSignal:
    """Teacher log-probabilities at temperature 1 and what they leave out."""

    kind: SignalKind
    """dense: K = V, column k is token k. top-k: the rest is `log_tail`. sampled: expectations
    under the teacher are sums over `weights`. conditional: normalized over the K tokens, the
    rest unknown."""
    log_probs: Tensor
    """(B, T, K) float32, natural log. Conditional signals sum to one over K."""
    mask: Tensor
    """(B, T) bool; True = the position counts."""
    token_ids: Tensor | None = None
    """(B, T, K) int64; None when dense."""
    log_tail: Tensor | None = None
    """(B, T) float32: log of the mass outside the K tokens; top-k only."""
    weights: Tensor | None = None
    """(B, T, K) float32, sampled only: E_p[f] is estimated by sum_k weights_k f(token_k)."""
    negative_ids: Tensor | None = None
    """(B, T, R) int64, the same R tokens at all positions: where a loss without full logits looks
    at the student in addition to `token_ids`. None = it looks at the whole vocabulary."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "TeacherSignal":
        """Return the signal with every tensor changed alike."""
        changed = {
            field.name: change(value)
            if isinstance(value := getattr(self, field.name), Tensor)
            else value
            for field in fields(self)
        }
        return TeacherSignal(**changed)

    def flatten(self) -> "TeacherSignal":
        """Return the signal with B and T as one axis of B * T positions."""
        return self.map(lambda tensor: tensor.flatten(0, 1))

    def chunks(self, size: int) -> Iterator[tuple[slice, "TeacherSignal"]]:
        """Return each run of `size` positions of a flattened signal, and the signal on it."""
        for start in range(0, len(self.mask), size):
            rows = slice(start, start + size)
            yield rows, self.map(lambda tensor, rows=rows: tensor[rows])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "TeacherSignal":
        """Return the same signal on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))


def text_signal(token_ids: Tensor, mask: Tensor) -> TeacherSignal:
    """Return the text itself as the teacher: position t is known to be followed by token t + 1.

    Cross-entropy on the likeliest token (`hard_top1`) is then that of next-token prediction.

    Args:
        token_ids: (B, L) int64.
        mask: (B, L - 1) bool.
    """
    labels = token_ids[:, 1:].unsqueeze(-1)  # (B, T, 1)
    log_probs = torch.zeros(labels.shape, device=labels.device)
    return TeacherSignal(kind="conditional", log_probs=log_probs, mask=mask, token_ids=labels)


def dense_signal(teacher_logits: Tensor, mask: Tensor) -> TeacherSignal:
    """Return the full signal of a live teacher's logits, (B, T, V)."""
    log_probs = torch.log_softmax(teacher_logits.float(), dim=-1)
    return TeacherSignal(kind="dense", log_probs=log_probs, mask=mask)


def top_k_signal(teacher_logits: Tensor, mask: Tensor, top_k: int) -> TeacherSignal:
    """Return the K likeliest of V tokens with their true log-probabilities and the tail's mass."""
    vocab_size = teacher_logits.shape[-1]
    if not 1 <= top_k <= vocab_size:
        raise ValueError(f"top-k {top_k} is outside 1..{vocab_size} (the vocabulary); choose less")
    log_probs = torch.log_softmax(teacher_logits.float(), dim=-1)
    kept, token_ids = log_probs.topk(top_k, dim=-1)  # (B, T, K)
    return TeacherSignal(
        kind="top-k", log_probs=kept, mask=mask, token_ids=token_ids, log_tail=log_rest(kept)
    )


def log_rest(log_probs: Tensor) -> Tensor:
    """Return log(1 - sum of exp) over the last axis, no less than float32 resolves."""
    rest = 1.0 - log_probs.exp().sum(dim=-1)
    return rest.clamp_min(LEAST_REST).log()
