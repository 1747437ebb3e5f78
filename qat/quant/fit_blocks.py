"""The fit of vector grids with super-block scales: a small integer times a float16 number.

For each sub-block several scales are tried; each fixes the points, which fix the best scale and the
error it leaves, sum h w^2 - (sum h w q)^2 / sum h q^2. Super-scales and integers near the best
scales come next, then each integer and its neighbours are tried with the points that suit them.

Shape legend: O out, I in, S sub-blocks of a row, q values of points over the scale.
"""

import torch
from torch import Tensor

from qat.grids.scalar import over_scale
from qat.grids.scales import group_error
from qat.quant.quantized_tensor import QuantizedTensor
from qat.quant.spec import TensorSpec

NEIGHBOURS = (-1, 1)
NUM_ROUNDS = 1  # of integers and super-scales


def fit_blocks(weight: Tensor, spec: TensorSpec, importance: Tensor) -> QuantizedTensor:
    """Return the quantized weight of least importance-weighted squared error.

    Args:
        weight: (O, I), float32.
        spec: A vector grid with super-block scales.
        importance: (I,), positive.
    """
    grid = spec.grid
    scale, mass = search_effective(weight, spec, importance)
    parts = spec.scale.from_effective(scale, mass)
    for _ in range(NUM_ROUNDS):
        parts = refit_super_scale(weight, spec, importance, parts)
        parts = search_integers(weight, spec, importance, parts)
    indices = grid.round(over_scale(weight, expanded(spec, parts)), None, importance)
    return QuantizedTensor(spec, indices, parts)


def nearest_values(weight: Tensor, scale: Tensor, spec: TensorSpec, importance: Tensor) -> Tensor:
    """Return the grid's values nearest to a weight over its scales, (O, S, weights of one)."""
    normalized = over_scale(weight, scale)
    values = spec.grid.nearest(normalized, None, importance)
    return values.view(*scale.shape, -1)


def expanded(spec: TensorSpec, parts: dict[str, Tensor]) -> Tensor:
    """Return the scale of each sub-block, (O, S), of parts as stored."""
    return spec.scale.expand(parts, lambda values: values)[0]


def search_effective(weight: Tensor, spec: TensorSpec, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best of several scales of each sub-block, (O, S), and how much each counts."""
    shape = (len(weight), weight.shape[1] // spec.scale.sub_block, -1)
    mass = importance.view(1, shape[1], -1)
    grouped = weight.view(shape)
    mean_square = (grouped.square() * mass).sum(-1) / mass.sum(-1)
    size = mean_square.sqrt().clamp_min(1e-10)
    best, best_square = size, torch.ones_like(size)
    most = torch.full_like(size, -1.0)
    for ratio in spec.grid.table.search_ratios:
        values = nearest_values(weight, size / ratio, spec, importance)
        along = (values * grouped * mass).sum(-1).clamp_min(0)
        square = (values.square() * mass).sum(-1).clamp_min(1e-30)
        gain = along.square() / square  # of the squared error, by the best scale
        is_better = gain > most
        best = torch.where(is_better, along / square, best)
        best_square = torch.where(is_better, square, best_square)
        most = torch.maximum(most, gain)
    return best, best_square


def refit_super_scale(
    weight: Tensor, spec: TensorSpec, importance: Tensor, parts: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return parts with the least-squares super-scales of their integers' points."""
    scale = expanded(spec, parts)
    values = nearest_values(weight, scale, spec, importance)
    grouped, mass = weight.view_as(values), importance.view(1, scale.shape[1], -1)
    square = (values.square() * mass).sum(-1).clamp_min(1e-30)
    aim = (values * grouped * mass).sum(-1) / square
    return spec.scale.with_super_scale(parts, aim, square)


def search_integers(
    weight: Tensor, spec: TensorSpec, importance: Tensor, parts: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return parts with the best of each sub-scale and its neighbours."""
    middle = best = parts["sub_scale"]
    least = None
    for step in (0, *NEIGHBOURS):
        candidate = (middle + step).clamp(0, spec.scale.top)
        scale = expanded(spec, {**parts, "sub_scale": candidate})
        values = nearest_values(weight, scale, spec, importance).view_as(weight)
        error = group_error(weight, values, scale, importance=importance)
        if least is None:
            least = error
            continue
        best = torch.where(error < least, candidate, best)
        least = torch.minimum(error, least)
    return {**parts, "sub_scale": best}
