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

from qat.quant.grid import FLOAT16_MAX, FLOAT16_TINY, snap_float16

RIDGE = 1e-6  # of the mean diagonal: keeps nearly collinear factors solvable in float32


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


def fit_group_scale(weight: Tensor, values: Tensor, importance: Tensor, former: Tensor) -> Tensor:
    """Return the least-squares scale of each group, on the float16 grid.

    A group whose best scale is not positive keeps its former one: that never raises the error
    above what it was, and no sign flips unnoticed.

    Args:
        weight: (O, I).
        values: Codebook value of each weight, (O, I).
        importance: (I,).
        former: Scale that the values were chosen with, (O, G).
    """
    num_groups = former.shape[1]
    weighted = (values * importance).view(weight.shape[0], num_groups, -1)
    grouped_weight = weight.view(weight.shape[0], num_groups, -1)
    grouped_values = values.view(weight.shape[0], num_groups, -1)
    along = (weighted * grouped_weight).sum(-1)
    square = (weighted * grouped_values).sum(-1)
    fitted = torch.where(along > 0, along / square.clamp_min(1e-30), former)
    return stored_scale(fitted)


def stored_scale(scale: Tensor) -> Tensor:
    """Return positive scales on the float16 grid, inside its normal range."""
    return snap_float16(scale.clamp(FLOAT16_TINY, FLOAT16_MAX))


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
    """Return rows @ columns as unit columns of A, unit rows of B and magnitudes, largest first."""
    row_norm = rows.norm(dim=0).clamp_min(1e-30)
    column_norm = columns.norm(dim=1).clamp_min(1e-30)
    magnitude, order = (row_norm * column_norm).sort(descending=True)
    return LowRank(
        snap_float16((rows / row_norm)[:, order]),
        snap_float16(magnitude),
        snap_float16((columns / column_norm.unsqueeze(1))[order]),
    )
