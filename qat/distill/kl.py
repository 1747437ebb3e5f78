"""Divergences between teacher and student, in nats, on logits that are there.

    forward_kl = sum_k p_k (log p_k - log q_k) + p_tail (log p_tail - log q_tail)

with p the teacher and q the student at temperature 1. For a dense teacher there is no tail; for a
sampled one the sum runs over its draws with their weights.

The other divergences compare the same cells: the K tokens and, for a top-k teacher, the rest as one
more; a sampled teacher has none. Every one of them is zero for a perfect student.

Student logits are (..., V) in any float dtype, results (...) float32 in nats.

Student logits may be all of them or those of `candidates`, where no signal is dense.

Shape legend: N positions, V vocabulary, K tokens the teacher is known on, C cells.
"""

import math

import torch
from torch import Tensor

from qat.distill.candidates import CandidateLogits, in_float32, known_logits, log_partition
from qat.distill.teacher import LEAST_REST, TeacherSignal

StudentLogits = Tensor | CandidateLogits


def forward_kl(student_logits: StudentLogits, signal: TeacherSignal) -> Tensor:
    """Return KL(teacher || student) of each position in nats.

    The teacher is known on K tokens; what it leaves out is one more cell on both sides, which
    makes the result a lower bound of the full KL that a perfect student still brings to zero.
    A sampled signal gives an unbiased estimate instead, a conditional one the KL within its K
    tokens.

    Source:
        Hinton et al. 2015, arXiv:1503.02531, section 2; one cell for the rest is the coarse-grained
        KL, below the full one by the data-processing inequality (Cover and Thomas, section 2.8).
    """
    if signal.kind == "conditional":
        return conditional_kl(student_logits, signal, temperature=1.0)
    log_probs, logits = signal.log_probs, in_float32(student_logits)
    student = known_logits(logits, signal) - log_partition(logits)  # (..., K)
    weights = log_probs.exp() if signal.weights is None else signal.weights
    divergence = (weights * (log_probs - student)).sum(-1)
    if signal.log_tail is None:
        return divergence
    return divergence + signal.log_tail.exp() * (signal.log_tail - log_outside(student))


def log_outside(log_probs: Tensor) -> Tensor:
    """Return the log of the probability outside the last axis, no less than float32 resolves."""
    inside = torch.logsumexp(log_probs, dim=-1).clamp_max(-LEAST_REST)
    return torch.log(-torch.expm1(inside))


def conditional_kl(
    student_logits: StudentLogits, signal: TeacherSignal, temperature: float
) -> Tensor:
    """Return the KL between both softmaxes over the K known tokens, both divided by temperature.

    The teacher's log-probabilities up to a constant are enough.
    """
    chosen = known_logits(student_logits, signal)
    teacher = torch.log_softmax(signal.log_probs / temperature, dim=-1)
    student = torch.log_softmax(chosen / temperature, dim=-1)
    return (teacher.exp() * (teacher - student)).sum(-1)


def kd_loss(
    student_logits: StudentLogits, signal: TeacherSignal, *, temperature: float = 2.0
) -> Tensor:
    """Return the seeds' distillation loss of each position, (...): T^2 KL within the K tokens.

    It says nothing of the mass outside the K tokens: for comparison with older runs only.
    """
    return conditional_kl(student_logits, signal, temperature) * temperature**2


def cells(student_logits: StudentLogits, signal: TeacherSignal) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of teacher and student on the same cells, (..., C) each.

    C is V for a dense signal, K + 1 for top-k, K for conditional, normalized over them on both
    sides. Draws of a sampled one give expectations under the teacher only.
    """
    if signal.kind == "sampled":
        raise ValueError(
            "a sampled cache gives expectations under the teacher only, which forward-kl needs; "
            "use --loss forward-kl, or a top-k or hidden cache"
        )
    logits = in_float32(student_logits) if signal.kind == "top-k" else student_logits
    chosen = known_logits(logits, signal)
    if signal.kind == "conditional":
        return torch.log_softmax(signal.log_probs, -1), torch.log_softmax(chosen, -1)
    if signal.token_ids is None:
        return signal.log_probs, torch.log_softmax(chosen, -1)
    student = chosen - log_partition(logits)
    teacher = torch.cat([signal.log_probs, signal.log_tail.unsqueeze(-1)], -1)
    return teacher, torch.cat([student, log_outside(student).unsqueeze(-1)], -1)


def kl_of_cells(left: Tensor, right: Tensor) -> Tensor:
    """Return KL(left || right) of log-probabilities (..., C), (...)."""
    return (left.exp() * (left - right)).sum(-1)


def log_mix(left: Tensor, right: Tensor, share: float) -> Tensor:
    """Return the log of share * exp(left) + (1 - share) * exp(right)."""
    return torch.logaddexp(left + math.log(share), right + math.log1p(-share))


def reverse_kl(student_logits: StudentLogits, signal: TeacherSignal) -> Tensor:
    """Return KL(student || teacher) of each position in nats: it seeks the teacher's modes.

    Source:
        Gu et al. 2023 (MiniLLM), arXiv:2306.08543, equation 1.
    """
    teacher, student = cells(student_logits, signal)
    return kl_of_cells(student, teacher)


def jensen_shannon(
    student_logits: StudentLogits, signal: TeacherSignal, share: float = 0.5
) -> Tensor:
    """Return the generalized Jensen-Shannon divergence of each position in nats.

    Returns:
        share KL(p || m) + (1 - share) KL(q || m), m = share p + (1 - share) q.

    Source:
        Agarwal et al. 2023 (GKD), arXiv:2306.13649, section 2.
    """
    teacher, student = cells(student_logits, signal)
    mixture = log_mix(teacher, student, share)
    forward, reverse = kl_of_cells(teacher, mixture), kl_of_cells(student, mixture)
    return share * forward + (1 - share) * reverse


def skewed_kl(student_logits: StudentLogits, signal: TeacherSignal, share: float = 0.1) -> Tensor:
    """Return KL(teacher || share teacher + (1 - share) student): its gradient is bounded.

    Source:
        Ko et al. 2024 (DistiLLM), arXiv:2402.03898, section 3.1.
    """
    teacher, student = cells(student_logits, signal)
    return kl_of_cells(teacher, log_mix(teacher, student, share))


def confidence_kl(student_logits: StudentLogits, signal: TeacherSignal) -> Tensor:
    """Return a mixture of reverse and forward KL by the teacher's confidence at each position.

    Where the teacher is sure the student seeks its mode, elsewhere it covers the spread. The
    confidence is the teacher's expected probability of its own next token, sum p^2.

    Source:
        Du et al. 2024 (BitDistiller), arXiv:2402.10631, section 3.3; there one confidence is taken
        over the data set, here one a position.
    """
    teacher, student = cells(student_logits, signal)
    confidence = (2 * signal.log_probs).exp().sum(-1).clamp_max(1.0)
    forward, reverse = kl_of_cells(teacher, student), kl_of_cells(student, teacher)
    return confidence * reverse + (1 - confidence) * forward


def hard_top1(student_logits: StudentLogits, signal: TeacherSignal) -> Tensor:
    """Return the cross-entropy of the student on the teacher's likeliest token, (...)."""
    best = signal.log_probs.argmax(-1, keepdim=True)
    logits = in_float32(student_logits)
    chosen = known_logits(logits, signal).gather(-1, best)
    return (log_partition(logits) - chosen).squeeze(-1)
