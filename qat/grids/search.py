"""The search of each group's scale, and offset, among many candidates.

A candidate rounds its group, least squares refits it to the values that this gives, and the
candidate whose values leave the least error stays. Coarse candidates come first, then neighbours of
the best: an error has many local minima in its scale, a fraction of a step of the grid apart.

Shape legend: O out, I in, G groups of a row, C codebook values.
"""

from collections.abc import Callable, Iterable
from itertools import product

import torch
from torch import Tensor

from qat.grids.scalar import ScalarGrid, over_scale, snap_float16
from qat.grids.scales import (
    GAUSSIAN_REACH,
    SEARCH_FACTORS,
    GroupScale,
    fit_group_scale,
    fit_offset,
    group_error,
    root_mean_square,
    stored_scale,
)
from qat.runtime.device import numbers_at_once

Scales = tuple[Tensor, ...]  # a scale, and an offset where there is one, (O, G) each
Fit = Callable[[Tensor, Scales], Scales]
LARGEST_FACTORS = (1.0, 1.1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the scale that clips nothing
POWER_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
# How many steps of the grid further or nearer its end may lie than at the best candidate.
FINE_STEPS = (-1.2, -0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.9, 1.2)
AFFINE_FACTORS = (1.0, 0.8)
AFFINE_STEPS = (2.0, 1.2, 0.8, 0.5, 0.3)  # in turn, at either end or both


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
    codebook = grid.start_codebook().to(weight.device)
    arm = codebook[codebook.abs().argmax()]
    middle = root_mean_square(weight, importance, form.groups_of(weight.shape[1])) / arm.abs()
    middle = middle * GAUSSIAN_REACH[len(codebook).bit_length() - 1]

    def fit(values: Tensor, scales: Scales) -> Scales:
        (scale,) = scales
        return (fit_group_scale(weight, values, importance, scale, is_signed=is_signed, form=form),)

    def best_of(scales: Iterable[Tensor]) -> Tensor:
        candidates = ((form.stored(scale),) for scale in scales)
        return best_scales(weight, importance, nearest, candidates, fit)[0]

    def nearest(values: Tensor) -> Tensor:
        return grid.nearest(values, codebook)

    if form.is_power:  # the next ones are worse by far
        return best_of(middle * factor for factor in POWER_FACTORS)
    largest = largest_weight(weight, middle.shape[1]) / arm
    coarse = [(largest if is_signed else largest.abs()) * factor for factor in LARGEST_FACTORS]
    coarse += [middle * factor for factor in SEARCH_FACTORS]
    if is_signed:
        coarse += [middle * -factor for factor in SEARCH_FACTORS]
    best = best_of(coarse)
    step = abs(float((codebook[1] - codebook[0]) / arm))
    return best_of(best * (1 + steps * step) for steps in FINE_STEPS)


def search_affine(
    weight: Tensor, importance: Tensor, grid: ScalarGrid, num_groups: int
) -> tuple[Tensor, Tensor]:
    """Return the best of several scales and offsets for each group, (O, G) each.

    The first candidate spans a group from its least to its largest weight, the next clip both ends
    or suit normally distributed weights; then each end of the best is moved.

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
    codebook = grid.start_codebook().to(weight.device)
    grouped = weight.view(weight.shape[0], num_groups, -1)
    low, high = grouped.amin(-1), grouped.amax(-1)
    middle, reach = (high + low) / 2, (high - low) / 2
    top = codebook[-1]

    def fit(values: Tensor, scales: Scales) -> Scales:
        return fit_offset(weight, values, importance, scales)

    def best_of(spans: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        candidates = (
            (stored_scale((high - low).clamp_min(0) / top), snap_float16(low))
            for low, high in spans
        )
        return best_scales(weight, importance, nearest, candidates, fit)

    def nearest(values: Tensor) -> Tensor:
        return grid.nearest(values, codebook)

    spans = [(middle - f * reach, middle + f * reach) for f in AFFINE_FACTORS]
    mass = importance.view(1, num_groups, -1)
    mean = (grouped * mass).sum(-1) / mass.sum(-1)
    size = ((grouped - mean.unsqueeze(-1)).square() * mass).sum(-1) / mass.sum(-1)
    size = size.sqrt() * GAUSSIAN_REACH[len(codebook).bit_length() - 1]
    spans += [(mean - f * size, mean + f * size) for f in SEARCH_FACTORS]
    scale, low = best_of(spans)
    for steps in AFFINE_STEPS:
        high, move = low + scale * top, scale * steps
        moves = product((0, -1, 1), repeat=2)
        scale, low = best_of((low + first * move, high + last * move) for first, last in moves)
    return scale, low


def largest_weight(weight: Tensor, num_groups: int) -> Tensor:
    """Return the weight of largest size of each group, with its sign, (O, G)."""
    grouped = weight.view(weight.shape[0], num_groups, -1)
    return grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)


def best_scales(
    weight: Tensor,
    importance: Tensor,
    nearest: Callable[[Tensor], Tensor],
    candidates: Iterable[Scales],
    fit: Fit,
) -> Scales:
    """Return the refitted candidate of least error in each group.

    Args:
        weight: (O, I).
        importance: (I,).
        nearest: Gives the grid's nearest values.
        candidates: As stored.
        fit: Least squares, of the values that a candidate rounds to and that candidate.
    """
    best = least = None
    for candidate in candidates:
        values = nearest(over_scale(weight, *candidate))
        fitted = fit(values, candidate)
        error = group_error(weight, values, *fitted, importance=importance)
        if best is None:
            best, least = fitted, error
            continue
        is_better = error < least
        best = tuple(
            torch.where(is_better, new, old) for new, old in zip(fitted, best, strict=True)
        )
        least = torch.minimum(error, least)
    return best
