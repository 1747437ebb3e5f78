"""The fit of vector grids with super-block scales: a small integer times a float16 number.

Super-scales and integers come from curves (`scale_curves`). Then the points that suit them fix the
best super-scales in closed form, and each integer and its neighbours are tried with the points that
suit them, in turn.

Shape legend: O out, I in, S sub-blocks of a row.
"""

import torch
from torch import Tensor

from qat.grids.scalar import over_scale
from qat.quant.quantized_tensor import QuantizedTensor
from qat.quant.scale_curves import FEWER_SAMPLES, NUM_SAMPLES, search_parts, sub_block_gains
from qat.quant.spec import TensorSpec

NEIGHBOURS = (-1, 1)
NUM_ROUNDS = 2  # of super-scales and integers: the second lowers the error by 0.5% at most


def fit_blocks(
    weight: Tensor, spec: TensorSpec, importance: Tensor, num_rounds: int = NUM_ROUNDS
) -> QuantizedTensor:
    """Return the quantized weight of least importance-weighted squared error.

    Args:
        weight: (O, I), float32.
        spec: A vector grid with super-block scales.
        importance: (I,), positive.
        num_rounds: Of super-scales and integers; fewer also sample fewer scales.
    """
    num_samples = NUM_SAMPLES if num_rounds >= NUM_ROUNDS else FEWER_SAMPLES
    parts = search_parts(weight, spec, importance, num_samples)
    for _ in range(num_rounds):
        parts = refit_super_scale(weight, spec, importance, parts)
        parts = search_integers(weight, spec, importance, parts)
    normalized = over_scale(weight, expanded(spec, parts))
    return QuantizedTensor(spec, spec.grid.round(normalized, None, importance), parts)


def expanded(spec: TensorSpec, parts: dict[str, Tensor]) -> Tensor:
    """Return the scale of each sub-block, (O, S), of parts as stored."""
    return spec.scale.expand(parts, lambda values: values)[0]


def refit_super_scale(
    weight: Tensor, spec: TensorSpec, importance: Tensor, parts: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return parts with the least-squares super-scales of their integers' points."""
    scale = expanded(spec, parts)
    values = spec.grid.nearest(over_scale(weight, scale), None, importance)
    grouped, mass, values = (
        part.view(len(part), scale.shape[1], -1) for part in (weight, importance[None], values)
    )
    square = (values.square() * mass).sum(-1).clamp_min(1e-30)
    return spec.scale.with_super_scale(parts, (values * grouped * mass).sum(-1) / square, square)


def search_integers(
    weight: Tensor, spec: TensorSpec, importance: Tensor, parts: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return parts with the best of each sub-scale and its neighbours."""
    middle = best = parts["sub_scale"]
    most = sub_block_gains(weight, expanded(spec, parts), spec, importance)
    for step in NEIGHBOURS:
        candidate = (middle + step).clamp(0, spec.scale.top)
        scale = expanded(spec, {**parts, "sub_scale": candidate})
        gain = sub_block_gains(weight, scale, spec, importance)
        best = torch.where(gain > most, candidate, best)
        most = torch.maximum(gain, most)
    return {**parts, "sub_scale": best}
