"""What the errors of earlier layers do to a layer's inputs, and the weight that makes up for it.

The quantized model feeds x_q to a layer where the full-precision one feeds x. The wanted output y
is W x, or what takes the residual stream to where the full-precision model has it. The wanted
weight gives it as nearly as x_q allows:

    W* = W + share aim (H + ridge)^-1
    aim = mean (y - W x_q) x_q^T,    H = mean x_q x_q^T

which is the ridge regression of y - W x_q on x_q. It has I unknowns a row and learns the
calibration text by heart: with a fixed small ridge, a model that is fitted layer by layer is
several times nearer to the teacher on that text than on any other. So ridge and share are chosen by
two-fold cross-validation, each half of the tokens predicting the other's.

A weight that makes the logits may be the embedding's too, whose errors count by the second moment
K of the gradient at its rows, and which should stay W. Both together ask for

    W + (W* - W) H (H + K)^-1

with errors that count by H + K.

Shape legend: O out, I in, S sampled rows.

Source: the target with y = W x is that of GPTAQ, Li et al. 2025, arXiv:2504.02692.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of the mean diagonal of H
SAMPLED_ROWS = 128  # of the weight, spread over it: enough to choose two numbers by


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Second moments of inputs on some tokens."""

    hessian: Tensor
    """mean x_q x_q^T, (I, I) float32."""
    drift: Tensor | None = None
    """mean (x - x_q) x_q^T, (I, I) float32, where W x is wanted."""
    wanted: Tensor | None = None
    """mean y x_q^T, (O, I) float32, where another output is."""

    def aim(self, weight: Tensor, rows: slice | Tensor = slice(None)) -> Tensor:
        """Return mean (y - W x_q) x_q^T of a weight's rows, (O, I) float32."""
        weight = weight[rows].detach().to(self.hessian)
        if self.wanted is None:
            return weight @ self.drift
        return self.wanted[rows] - weight @ self.hessian


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """How far the wanted weight goes."""

    ridge: float
    """Of the mean diagonal of H."""
    share: float
    """Of the regression's answer, 0 to 1."""


def choose_corrections(weights: Sequence[Tensor], halves: Sequence[Moments]) -> list[Correction]:
    """Return the ridge and share with which each half of the tokens predicts the other best.

    For one ridge the error on the other half is quadratic in the share, so its best is at hand.

    Args:
        weights: That read the same inputs, (O, I) each.
        halves: Moments of each half.

    Returns:
        A correction for each weight.
    """
    spreads = [slice(None, None, -(-len(weight) // SAMPLED_ROWS)) for weight in weights]
    pairs = list(zip(weights, spreads, strict=True))
    parts = [[half.aim(weight, spread) for weight, spread in pairs] for half in halves]
    sizes = list(map(len, parts[0]))
    aims = list(map(torch.cat, parts))  # (S, I) each, of all weights
    best = [(0.0, Correction(ridge=RIDGES[-1], share=0.0))] * len(sizes)
    for ridge in RIDGES:
        along, square = [], []  # (S,) each, of the two directions
        for learned, judged in ((0, -1), (-1, 0)):
            change = solved(aims[learned], *ridge_factor(halves[learned].hessian, ridge))
            along.append((aims[judged] * change).sum(1))
            square.append(((change @ halves[judged].hessian) * change).sum(1))
        sums = [[s.sum() for s in sum(rows).split(sizes)] for rows in (along, square)]
        for place, (one, other) in enumerate(zip(*sums, strict=True)):
            share = float((one / other.clamp_min(1e-30)).clamp(0, 1))
            error = share * share * float(other) - 2 * share * float(one)
            candidate = error, Correction(ridge=ridge, share=share)
            best[place] = min(best[place], candidate, key=lambda pair: pair[0])
    return [correction for _, correction in best]


def ridge_factor(hessian: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return the lower factor of H / mean + ridge, and the mean of H's diagonal.

    That there is no factor is told by a mean of zero, without a look at the device.
    """
    mean = hessian.diagonal().mean()
    damped = hessian / mean.clamp_min(1e-30)
    damped.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(damped)
    return factor, torch.where(failed > 0, 0.0, mean)


def solved(aim: Tensor, factor: Tensor, mean: Tensor) -> Tensor:
    """Return aim times the inverse of a damped H, (O, I), given what `ridge_factor` returns."""
    answer = torch.cholesky_solve(aim.T, factor).T / mean
    return torch.where(mean > 0, answer, 0.0)


class WantedWeight:
    """W*, (O, I) float32 where the moments are, some rows at a time."""

    def __init__(
        self, weight: Tensor, moments: Moments, correction: Correction, kept: Tensor | None = None
    ):
        """Take a weight, (O, I), how far to go, and K of one that is an embedding's, (I, I)."""
        self.weight, self.moments, self.share = weight.detach(), moments, correction.share
        self.factor = ridge_factor(moments.hessian, correction.ridge)
        self.pull = None
        if kept is not None:
            both = ridge_factor(moments.hessian + kept, RIDGES[0])
            self.pull = solved(moments.hessian, *both)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Return some rows."""
        change = solved(self.moments.aim(self.weight, rows), *self.factor)
        change = change if self.pull is None else change @ self.pull
        return self.weight[rows].to(change) + self.share * change


def wanted_weight(
    weight: Tensor, moments: Moments, correction: Correction, kept: Tensor | None = None
) -> WantedWeight | None:
    """Return W*; None where it is the weight itself. K is that of an embedding's weight."""
    return WantedWeight(weight, moments, correction, kept) if correction.share else None
