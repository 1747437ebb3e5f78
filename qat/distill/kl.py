"""Divergences between teacher and student, in nats, on logits that are there.

    forward_kl = sum_k p_k (log p_k - log q_k) + p_tail (log p_tail - log q_tail)

with p the teacher and q the student at temperature 1. For a dense teacher there is no tail; for a
sampled one the sum runs over its draws with their weights.

Shape legend: N positions, V vocabulary, K tokens the teacher is known on.
"""

import torch
from torch import Tensor

from qat.distill.teacher import TeacherSignal

LEAST_REST = 1e-7  # float32 cannot tell one minus less from one


def forward_kl(student_logits: Tensor, signal: TeacherSignal) -> Tensor:
    """Return KL(teacher || student) of each position in nats.

    The teacher is known on K tokens; what it leaves out is one more cell on both sides, which
    makes the result a lower bound of the full KL that a perfect student still brings to zero.
    A sampled signal gives an unbiased estimate instead, a conditional one the KL within its K
    tokens.

    Args:
        student_logits: (..., V), any float dtype; read in float32.
        signal: The teacher on the same positions.

    Returns:
        (...), float32.

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2; one cell for the rest is the coarse-grained
        KL, below the full one by the data-processing inequality (Cover and Thomas, section 2.8).
    """
    logits = student_logits.float()
    if signal.kind == "conditional":
        return conditional_kl(logits, signal, temperature=1.0)
    log_probs = signal.log_probs
    log_partition = torch.logsumexp(logits, dim=-1, keepdim=True)
    chosen = logits if signal.token_ids is None else logits.gather(-1, signal.token_ids)
    student = chosen - log_partition  # (..., K)
    weights = log_probs.exp() if signal.weights is None else signal.weights
    divergence = (weights * (log_probs - student)).sum(-1)
    if signal.log_tail is None:
        return divergence
    return divergence + signal.log_tail.exp() * (signal.log_tail - log_outside(student))


def log_outside(log_probs: Tensor) -> Tensor:
    """Return the log of the probability outside the last axis, no less than float32 resolves."""
    inside = torch.logsumexp(log_probs, dim=-1).clamp_max(-LEAST_REST)
    return torch.log(-torch.expm1(inside))


def conditional_kl(logits: Tensor, signal: TeacherSignal, temperature: float) -> Tensor:
    """Return the KL between both softmaxes over the K known tokens, (...).

    Args:
        logits: Student, (..., V), float32.
        signal: Teacher; log-probabilities up to a constant are enough.
        temperature: Divides both sides' logits.
    """
    chosen = logits if signal.token_ids is None else logits.gather(-1, signal.token_ids)
    teacher = torch.log_softmax(signal.log_probs / temperature, dim=-1)
    student = torch.log_softmax(chosen / temperature, dim=-1)
    return (teacher.exp() * (teacher - student)).sum(-1)


def kd_loss(student_logits: Tensor, signal: TeacherSignal, *, temperature: float = 2.0) -> Tensor:
    """Return the seeds' distillation loss of each position, (...): T^2 KL within the K tokens.

    It says nothing of the mass outside the K tokens: for comparison with older runs only.

    Args:
        student_logits: (..., V), any float dtype.
        signal: The teacher on the same positions.
        temperature: T.
    """
    divergence = conditional_kl(student_logits.float(), signal, temperature)
    return divergence * temperature**2


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the values that count; zero when none does."""
    return (values * mask).sum() / mask.sum().clamp_min(1)
