"""Scales: the least-squares scale of a group, and low-rank scales by alternating least squares.

Given the codebook value c that each weight w stands for and the importance h of its error, the best
scale of a group is closed form,

    s = sum h w c / sum h c^2,

and the best low-rank scales S = (A * g) @ B minimize sum h c^2 (w / c - S)^2, which is linear in
each row of A for fixed B and in each column of B for fixed A. All rows are solved in one batch:
their R x R normal matrices come from one product with the table of outer products.

Shape legend: O out, I in, G groups of a row, R rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qat.grids.scalar import (
    FLOAT16_MAX,
    FLOAT16_TINY,
    fits_float16,
    nearest_values,
    over_scale,
    snap_float16,
    times_scale,
)

RIDGE = 1e-6  # of the mean diagonal: keeps nearly collinear factors solvable in float32
# Largest value of the best even grid of 2**bits values for a Gaussian of deviation one, half a step
# further out on one side as integer grids are (Max 1960, table II).
GAUSSIAN_REACH = {2: 2.0, 3: 2.3, 4: 2.7, 5: 3.0, 6: 3.3, 7: 3.6, 8: 3.9}
SEARCH_FACTORS = (0.75, 1.0, 1.3)


class LowRank(NamedTuple):
    """Factors of S = (scale_a * magnitude) @ scale_b; unit columns in A, unit rows in B."""

    scale_a: Tensor  # (O, R)
    magnitude: Tensor  # (R,)
    scale_b: Tensor  # (R, I)


def start_scale(weight: Tensor, importance: Tensor, num_groups: int) -> Tensor:
    """Return the importance-weighted root mean square of each group, (O, G)."""
    grouped = weight.view(weight.shape[0], num_groups, -1)
    mass = importance.view(1, num_groups, -1)
    mean_square = (grouped.square() * mass).sum(-1) / mass.sum(-1).clamp_min(1e-30)
    return stored_scale(mean_square.sqrt())


def search_scale(
    weight: Tensor, importance: Tensor, codebook: Tensor, num_groups: int, *, is_signed: bool
) -> Tensor:
    """Return the best of several scales for each group, (O, G), given the codebook.

    Most codebooks reach further on one side: where a scale may be negative, its sign decides which
    side of a group gets the longer arm. Each candidate is refitted before the comparison; the first
    puts the group's largest weight on the end of that arm, which finds weights that lie on the
    grid.

    Args:
        weight: (O, I).
        importance: (I,).
        codebook: (C,), ascending.
        num_groups: G.
        is_signed: Whether a scale may be negative.
    """
    arm = codebook[codebook.abs().argmax()]
    largest = largest_weight(weight, num_groups) / arm
    middle = start_scale(weight, importance, num_groups) / arm.abs()
    middle = middle * GAUSSIAN_REACH[(len(codebook) - 1).bit_length()]
    candidates = [largest if is_signed else largest.abs()]
    candidates += [middle * factor for factor in SEARCH_FACTORS]
    if is_signed:
        candidates += [middle * -factor for factor in SEARCH_FACTORS]
    best, least = middle, torch.full_like(middle, torch.inf)
    for candidate in candidates:
        scale = stored_scale(candidate)
        values = nearest_values(over_scale(weight, scale), codebook)
        scale = fit_group_scale(weight, values, importance, scale, is_signed=is_signed)
        values = nearest_values(over_scale(weight, scale), codebook)
        error = group_error(weight, values, scale, importance)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def largest_weight(weight: Tensor, num_groups: int) -> Tensor:
    """Return the weight of largest size of each group, with its sign, (O, G)."""
    grouped = weight.view(weight.shape[0], num_groups, -1)
    return grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)


def group_error(weight: Tensor, values: Tensor, scale: Tensor, importance: Tensor) -> Tensor:
    """Return the importance-weighted squared error of each group, (O, G)."""
    error = weight - times_scale(values, scale)
    return (error.square() * importance).view(*scale.shape, -1).sum(-1)


def fit_group_scale(
    weight: Tensor,
    values: Tensor,
    importance: Tensor,
    former: Tensor,
    *,
    is_signed: bool = False,
) -> Tensor:
    """Return the least-squares scale of each group, on the float16 grid.

    A group whose best scale is not of the sign allowed keeps its former one: that never raises the
    error above what it was, and no sign flips unnoticed.

    Args:
        weight: (O, I).
        values: Codebook value of each weight, (O, I).
        importance: (I,).
        former: Scale that the values were chosen with, (O, G).
        is_signed: Whether a scale may be negative.
    """
    num_groups = former.shape[1]
    weighted = (values * importance).view(weight.shape[0], num_groups, -1)
    grouped_weight = weight.view(weight.shape[0], num_groups, -1)
    grouped_values = values.view(weight.shape[0], num_groups, -1)
    along = (weighted * grouped_weight).sum(-1)
    square = (weighted * grouped_values).sum(-1)
    return nearest_stored_scale(along / square.clamp_min(1e-30), former, is_signed=is_signed)


def nearest_stored_scale(fitted: Tensor, former: Tensor, *, is_signed: bool) -> Tensor:
    """Return fitted scales as they are stored; the former one where no such scale is near.

    Args:
        fitted: (O, G), any numbers.
        former: (O, G), as stored.
        is_signed: Whether a scale may be negative.
    """
    allowed = (fitted != 0) if is_signed else (fitted > 0)
    return stored_scale(torch.where(allowed & torch.isfinite(fitted), fitted, former))


def stored_scale(scale: Tensor) -> Tensor:
    """Return scales on the float16 grid, inside its normal range, each of the sign it had."""
    return snap_float16(scale.abs().clamp(FLOAT16_TINY, FLOAT16_MAX).copysign(scale))


def start_low_rank(scale: Tensor, rank: int) -> LowRank:
    """Return the rank-R approximation of an (O, I) scale matrix, found without a full SVD."""
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(0)  # svd_lowrank draws its test matrix; the result must not depend on luck
    left, singular, right = torch.svd_lowrank(scale, q=min(rank + 4, *scale.shape), niter=4)
    torch.random.set_rng_state(generator_state)
    return LowRank(left[:, :rank], singular[:rank], right[:, :rank].T)


def fit_low_rank(
    weight: Tensor, values: Tensor, importance: Tensor, former: LowRank, num_rounds: int = 2
) -> LowRank:
    """Return low-rank scales after rounds of alternating least squares.

    Args:
        weight: (O, I).
        values: Codebook value of each weight, (O, I).
        importance: (I,).
        former: Factors that the values were chosen with.
        num_rounds: Solves of both factors.
    """
    mass = values.square() * importance  # (O, I)
    target = values * weight * importance  # (O, I): mass * (w / c) without the division
    rows, columns = former.scale_a * former.magnitude, former.scale_b  # (O, R), (R, I)
    for _ in range(num_rounds):
        rows = solve_rows(mass, target, columns)
        columns = solve_rows(mass.T, target.T, rows.T).T
    return unit_factors(rows, columns)


def solve_rows(mass: Tensor, target: Tensor, basis: Tensor) -> Tensor:
    """Return the rows x of least sum mass (target / mass - x @ basis)^2, all at once.

    Args:
        mass: (O, I), not negative.
        target: (O, I): mass times the wanted value.
        basis: (R, I).
    """
    rank = basis.shape[0]
    outer = (basis.unsqueeze(0) * basis.unsqueeze(1)).view(rank * rank, -1)  # (R * R, I)
    normal = (mass @ outer.T).view(-1, rank, rank)  # (O, R, R)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(dim=1, keepdim=True) + 1e-30
    return torch.linalg.solve(normal, (target @ basis.T).unsqueeze(-1)).squeeze(-1)


def unit_factors(rows: Tensor, columns: Tensor) -> LowRank:
    """Return rows @ columns as unit columns of A, unit rows of B and magnitudes, largest first.

    Raises:
        ValueError: If a magnitude is NaN or beyond float16.
    """
    row_norm = rows.norm(dim=0).clamp_min(1e-30)
    column_norm = columns.norm(dim=1).clamp_min(1e-30)
    magnitude, order = (row_norm * column_norm).sort(descending=True)
    if not fits_float16(magnitude):
        raise ValueError(
            f"low-rank scales of size {float(magnitude[0]):.3g} do not fit float16; "
            "take group scales for this model (_gN)"
        )
    return LowRank(
        snap_float16((rows / row_norm)[:, order]),
        snap_float16(magnitude),
        snap_float16((columns / column_norm.unsqueeze(1))[order]),
    )
