"""The search of each group's scale, and offset, among many candidates.

A candidate rounds its group, least squares refits it to the values that this gives, and the
candidate whose values leave the least error stays. Coarse candidates come first, then neighbours of
the best: an error has many local minima in its scale, a fraction of a step of the grid apart.

The error is summed over what is left of each weight. That sums of squares give it as well, as
sum h w^2 - s (2 sum h w c - s sum h c^2) with the importance h and the values c that the weights w
are rounded to, is of no use: float32 rounds away of sum h w^2 what neighbours differ by, and
another one would be the best on each device.

Shape legend: O out, I in, G groups of a row, D weights of a group, N groups of some rows.
"""

from collections.abc import Iterable
from itertools import product

import torch
from torch import Tensor

from qat.grids.scalar import ScalarGrid, snap_float16
from qat.grids.scales import (
    GAUSSIAN_REACH,
    SEARCH_FACTORS,
    GroupScale,
    nearest_stored_scale,
    stored_scale,
)
from qat.runtime.device import numbers_at_once

LARGEST_FACTORS = (1.0, 1.1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the scale that clips nothing
POWER_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
# How many steps of the grid further or nearer its end may lie than at the best candidate.
FINE_STEPS = (-1.2, -0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.9, 1.2)
AFFINE_FACTORS = (1.0, 0.8)
AFFINE_STEPS = (2.0, 1.2, 0.8, 0.5, 0.3)  # in turn, at either end or both


class Groups:
    """The groups of some rows, and sums over their weights."""

    def __init__(self, weight: Tensor, importance: Tensor, num_groups: int, grid: ScalarGrid):
        """Take rows, (O, I), how much each input counts, (I,), and the grid that they round to."""
        size = weight.shape[1] // num_groups
        self.shape, self.grid = (len(weight), num_groups), grid
        self.weight = weight.reshape(-1, size)  # (N, D)
        self.mass = importance.expand_as(weight).reshape(-1, size)
        self.codebook = grid.start_codebook().to(weight.device)  # (C,)

    def mean(self) -> Tensor:
        """Return the mean weight, (N,)."""
        return (self.weight * self.mass).sum(1) / self.mass.sum(1).clamp_min(1e-30)

    def root_mean_square(self) -> Tensor:
        """Return the root mean square weight, (N,)."""
        square = (self.weight.square() * self.mass).sum(1)
        return (square / self.mass.sum(1).clamp_min(1e-30)).sqrt()

    def largest(self) -> Tensor:
        """Return the weight of largest size, with its sign, (N,)."""
        return self.weight.gather(1, self.weight.abs().argmax(1, keepdim=True)).squeeze(1)

    def nearest(self, normalized: Tensor) -> Tensor:
        """Return the grid's nearest values, (N, D), of weights over scales; they are used up."""
        low = self.grid.first_value
        if low is None:
            return self.grid.nearest(normalized, self.codebook)
        return normalized.sub_(low).round_().clamp_(0, len(self.codebook) - 1).add_(low)

    def sums(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return sum h c w and sum h c^2 of values c, (N,) each, and h c, (N, D)."""
        weighted = values * self.mass
        return (weighted * self.weight).sum(1), (weighted * values).sum(1), weighted

    def errors(self, values: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """Return the error of values (N, D), which are used up, times scales (plus offsets)."""
        left = values.mul_(scale.unsqueeze(1))
        left = left if offset is None else left.add_(offset.unsqueeze(1))
        return left.sub_(self.weight).square_().mul_(self.mass).sum(1)


def search_scale(
    weight: Tensor, importance: Tensor, grid: ScalarGrid, form: GroupScale, *, is_signed: bool
) -> Tensor:
    """Return the best of several scales for each group, (O, G), given a grid of fixed values.

    Most codebooks reach further on one side: where a scale may be negative, its sign decides which
    side of a group gets the longer arm. The first candidate puts the group's largest weight on the
    end of that arm, which finds weights that lie on the grid.

    Args:
        weight: (O, I).
        importance: (I,).
        grid: The values.
        form: Of the scales.
        is_signed: Whether a scale may be negative.
    """
    step = max(1, numbers_at_once(weight.device) // weight.shape[1])
    if len(weight) > step:  # what a candidate needs stays in a cache
        chunks = weight.split(step)
        found = [search_scale(rows, importance, grid, form, is_signed=is_signed) for rows in chunks]
        return torch.cat(found)
    groups = Groups(weight, importance, form.groups_of(weight.shape[1]), grid)
    codebook = groups.codebook
    arm = codebook[codebook.abs().argmax()]
    middle = groups.root_mean_square() / arm.abs()
    middle = middle * GAUSSIAN_REACH[len(codebook).bit_length() - 1]

    def best_of(scales: Iterable[Tensor]) -> Tensor:
        best = least = None
        for scale in scales:
            former = form.stored(scale)
            values = groups.nearest(groups.weight / former.unsqueeze(1))
            along, square, _ = groups.sums(values)
            fitted = along / square.clamp_min(1e-30)
            fitted = nearest_stored_scale(fitted, former, is_signed=is_signed, form=form)
            best, least = better((fitted,), groups.errors(values, fitted), best, least)
        return best[0]

    if form.is_power:  # the next ones are worse by far
        return best_of(middle * factor for factor in POWER_FACTORS).view(groups.shape)
    largest = groups.largest() / arm
    coarse = [(largest if is_signed else largest.abs()) * factor for factor in LARGEST_FACTORS]
    coarse += [middle * factor for factor in SEARCH_FACTORS]
    if is_signed:
        coarse += [middle * -factor for factor in SEARCH_FACTORS]
    best = best_of(coarse)
    step = abs(float((codebook[1] - codebook[0]) / arm))
    return best_of(best * (1 + steps * step) for steps in FINE_STEPS).view(groups.shape)


def search_affine(
    weight: Tensor, importance: Tensor, grid: ScalarGrid, num_groups: int
) -> tuple[Tensor, Tensor]:
    """Return the best of several scales and offsets for each group, (O, G) each.

    The first candidate spans a group from its least to its largest weight, the next clip both ends
    or suit normally distributed weights; then each end of the best is moved. Weights are taken
    relative to their group's mean: sums of squares then round little away.

    Args:
        weight: (O, I).
        importance: (I,).
        grid: 0 .. C - 1.
        num_groups: G.
    """
    step = max(1, numbers_at_once(weight.device) // weight.shape[1])
    if len(weight) > step:
        chunks = weight.split(step)
        found = [search_affine(rows, importance, grid, num_groups) for rows in chunks]
        return tuple(map(torch.cat, zip(*found, strict=True)))
    groups = Groups(weight, importance, num_groups, grid)
    mean, total = groups.mean(), groups.mass.sum(1).clamp_min(1e-30)
    groups.weight = groups.weight - mean.unsqueeze(1)
    top = groups.codebook[-1]

    def best_of(spans: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        best = least = None
        for low, high in spans:
            former = stored_scale((high - low).clamp_min(0) / top)
            normalized = (groups.weight - low.unsqueeze(1)).div_(former.unsqueeze(1))
            values = groups.nearest(normalized)
            along, square, weighted = groups.sums(values)
            middle = weighted.sum(1) / total
            spread = square - total * middle.square()
            slope = along / spread.clamp_min(1e-30)
            is_fitted = (slope > 0) & torch.isfinite(slope)
            scale = stored_scale(torch.where(is_fitted, slope, former))
            offset = snap_float16(torch.where(is_fitted, mean - scale * middle, low + mean)) - mean
            error = groups.errors(values, scale, offset)
            best, least = better((scale, offset), error, best, least)
        return best

    low, high = groups.weight.amin(1), groups.weight.amax(1)
    middle, reach = (high + low) / 2, (high - low) / 2
    spans = [(middle - f * reach, middle + f * reach) for f in AFFINE_FACTORS]
    size = groups.root_mean_square() * GAUSSIAN_REACH[len(groups.codebook).bit_length() - 1]
    spans += [(-f * size, f * size) for f in SEARCH_FACTORS]
    scale, low = best_of(spans)
    for steps in AFFINE_STEPS:
        high, move = low + scale * top, scale * steps
        moves = product((0, -1, 1), repeat=2)
        scale, low = best_of((low + first * move, high + last * move) for first, last in moves)
    return scale.view(groups.shape), snap_float16(low + mean).view(groups.shape)


def better(
    found: tuple[Tensor, ...], error: Tensor, best: tuple[Tensor, ...] | None, least: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return what was found where its error is less, the best so far elsewhere, and the errors."""
    if best is None or least is None:
        return found, error
    pairs = zip(found, best, strict=True)
    return tuple(new.where(error < least, old) for new, old in pairs), torch.minimum(error, least)
