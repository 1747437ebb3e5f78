"""Normal equations of groups' scales against H: one small system a row.

Shape legend: O out, I in, G groups of a row, N systems, D unknowns of a system.
"""

from collections.abc import Callable

import torch
from torch import Tensor

RIDGE = 1e-6  # of the mean diagonal: keeps nearly collinear groups solvable in float32
HARD_RIDGE = 1e-3  # where that is not enough
NUMBERS_AT_ONCE = 2**22  # of normal matrices: they stay in a CPU's cache, and memory is bounded


def row_chunks(num_rows: int, num_unknowns: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return the rows, (o,) each, whose (o, D, D) normal matrices are formed together."""
    step = max(1, NUMBERS_AT_ONCE // num_unknowns**2)
    return torch.arange(num_rows, device=device).split(step)


def group_sums(values: Tensor, num_groups: int) -> Tensor:
    """Return the sum of each group, (O, G), of (O, I) values."""
    return values.view(len(values), num_groups, -1).sum(-1)


def group_products(
    values: Tensor, hessian: Tensor, num_groups: int, others: Tensor | None = None
) -> Tensor:
    """Return sum over i in g, j in h of c_i H_ij d_j for each row, (O, G, G).

    Args:
        values: c, (O, I).
        hessian: (I, I).
        num_groups: G.
        others: d, (O, I) or a row for all, (1, I); c itself when not given.
    """
    num_rows, num_inputs = values.shape
    is_symmetric, size = others is None, num_inputs // num_groups
    others = values if others is None else others
    normal = torch.empty(num_rows, num_groups, num_groups, device=values.device)
    for group in range(num_groups):
        first = group if is_symmetric else 0
        inside, right = slice(group * size, (group + 1) * size), slice(first * size, None)
        pulled = values[:, inside] @ hessian[inside, right]  # (O, I), or what is not known yet
        sums = (pulled * others[:, right]).view(num_rows, -1, size).sum(-1)
        normal[:, group, first:] = sums
        if is_symmetric:
            normal[:, first:, group] = sums
    return normal


def with_offsets(normal: Tensor, values: Tensor, hessian: Tensor, num_groups: int) -> Tensor:
    """Return the normal matrices of scales and offsets together, (O, 2G, 2G)."""
    ones = torch.ones_like(values[:1])
    mixed = group_products(values, hessian, num_groups, ones)  # (O, G, G)
    even = group_products(ones, hessian, num_groups).expand_as(mixed)
    top = torch.cat([normal, mixed], dim=2)
    return torch.cat([top, torch.cat([mixed.transpose(1, 2), even], dim=2)], dim=1)


def solve_damped(normal: Tensor, wanted: Tensor) -> Tensor:
    """Return x of normal @ x = wanted, (N, D), for symmetric (N, D, D) that may be singular.

    Rows that rounding has left without a Cholesky factor are damped harder; callers compare what
    comes out, as a second failure gives just anything. LU factors are not an
    option: MKL's, threaded over a batch, were seen to hang.
    """
    mean = normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    factor, failed = damped_factor(normal, RIDGE * mean)
    if (failed := failed > 0).any():
        factor[failed] = damped_factor(normal[failed], HARD_RIDGE * mean[failed])[0]
    return torch.cholesky_solve(wanted.unsqueeze(-1), factor).squeeze(-1)


def damped_factor(normal: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """Return lower Cholesky factors of (N, D, D) with ridges (N,) added, and which failed, (N,)."""
    identity = torch.eye(normal.shape[1], dtype=normal.dtype, device=normal.device)
    return torch.linalg.cholesky_ex(normal + ridge.view(-1, 1, 1) * identity)


def descend_scales(
    normal: Tensor, wanted: Tensor, scale: Tensor, stored: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return positive scales (N, G) after one pass, each the best stored one given all others."""
    scale = scale.clone()
    slope = torch.einsum("nij,nj->ni", normal, scale) - wanted
    for group in range(scale.shape[1]):
        previous = scale[:, group].clone()
        best = previous - slope[:, group] / normal[:, group, group].clamp_min(1e-30)
        scale[:, group] = torch.where(best > 0, stored(best), previous)
        slope += normal[:, :, group] * (scale[:, group] - previous).unsqueeze(1)
    return scale


def change_in_error(normal: Tensor, wanted: Tensor, x: Tensor, former: Tensor) -> Tensor:
    """Return by how much x^T normal x - 2 wanted^T x changes from a former x to x, (N,).

    What both have in common is never formed: float32 tells gains of 8 bits from nothing.
    """
    middle = (normal @ (x + former).unsqueeze(-1)).squeeze(-1) - 2 * wanted
    return (middle * (x - former)).sum(-1)
