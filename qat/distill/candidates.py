"""The student on a few candidate tokens, for losses that never form all of its logits.

    Z = sum_known e^z + sum_rest e^z,   sum_rest is estimated by V / R * sum e^z over the drawn ones

Known are the tokens that the teacher is known on; R negatives are drawn uniformly and without
repetition from all V tokens, so each is among them with probability R / V. Those that are known
already count once. The estimate of Z has no bias, and with R = V no error; its logarithm is low by
about half its relative variance. One draw serves all positions of a batch, so that the head is
gathered once for the negatives.

Shape legend: N positions (one or more axes), V vocabulary, K known tokens, R negatives.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from qat.distill.teacher import TeacherSignal

STREAM = 0x6E6567  # keeps these draws apart from the order of the data, which has the same seed


@dataclass(frozen=True, slots=True)
class CandidateLogits:
    """What a loss reads of a student whose other logits were never formed."""

    known: Tensor
    """(N, K) float32: logits of the tokens that the teacher is known on."""
    log_partition: Tensor
    """(N, 1) float32: log of the estimated sum of e^logit over the vocabulary."""


def draw_negatives(seed: int, number: int, vocab_size: int, num_negatives: int) -> Tensor:
    """Return R different token ids for the batch of a number, (R,) int64, R at most V.

    They follow from seed and number alone, so that a resumed run draws the same.
    """
    count = min(num_negatives, vocab_size)
    generator = np.random.default_rng([seed, number, STREAM])
    return torch.from_numpy(generator.choice(vocab_size, count, replace=False, shuffle=False))


def with_negatives(signal: TeacherSignal, negative_ids: Tensor) -> TeacherSignal:
    """Return a signal that asks for these tokens, (R,), at all of its positions; none is copied."""
    drawn = negative_ids.to(signal.mask.device).expand(*signal.mask.shape, -1)
    return replace(signal, negative_ids=drawn)


def candidate_logits(
    signal: TeacherSignal, known: Tensor, negatives: Tensor, vocab_size: int
) -> CandidateLogits:
    """Return a student's logits on the known tokens and the partition estimated from all.

    Args:
        signal: The teacher on N positions, with token ids and negative ids.
        known: Student's logits on the signal's tokens, (N, K), any float dtype.
        negatives: On the drawn ones, (N, R).
        vocab_size: V.

    Source:
        Weights of one over the probability of being drawn, Horvitz and Thompson 1952; softmax with
        a sampled partition, Jean et al. 2015, arXiv 1412.2007, section 3.1.
    """
    known, negatives = known.float(), negatives.float()
    count = negatives.shape[-1]
    absent = float("-inf")
    drawn = signal.negative_ids.flatten(0, -2)[0]  # (R,), the same at all positions
    place = torch.full((vocab_size,), count, device=known.device)  # of a token among the negatives
    place = place.scatter(0, drawn, torch.arange(count, device=known.device))
    is_known = torch.zeros(*known.shape[:-1], count + 1, dtype=torch.bool, device=known.device)
    is_known = is_known.scatter(-1, place[signal.token_ids], True)[..., :count]  # (N, R)
    rest = (negatives + math.log(vocab_size / count)).masked_fill(is_known, absent)
    is_drawn = signal.weights is not None  # a token may be among a position's known ones twice
    once = known.masked_fill(repeats(signal.token_ids), absent) if is_drawn else known
    both = torch.cat([once, rest], dim=-1)
    return CandidateLogits(known, both.logsumexp(dim=-1, keepdim=True))


def repeats(token_ids: Tensor) -> Tensor:
    """Return where a token is one that came earlier at its position, (..., K) bool."""
    same = token_ids.unsqueeze(-1) == token_ids.unsqueeze(-2)  # (..., K, K)
    return same.tril(diagonal=-1).any(dim=-1)


def in_float32(student: Tensor | CandidateLogits) -> Tensor | CandidateLogits:
    """Return student logits converted once, for whoever reads all of them more than once."""
    return student if isinstance(student, CandidateLogits) else student.float()


def known_logits(student: Tensor | CandidateLogits, signal: TeacherSignal) -> Tensor:
    """Return the student's logits on the signal's tokens, (..., K) float32."""
    if isinstance(student, CandidateLogits):
        return student.known
    chosen = student if signal.token_ids is None else student.gather(-1, signal.token_ids)
    return chosen.float()


def log_partition(student: Tensor | CandidateLogits) -> Tensor:
    """Return the log of the sum of e^logit over the vocabulary, (..., 1) float32."""
    if isinstance(student, CandidateLogits):
        return student.log_partition
    return student.float().logsumexp(dim=-1, keepdim=True)
