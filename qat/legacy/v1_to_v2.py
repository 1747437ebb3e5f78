"""Students of the seeds' first form to the second: the floor under their scales goes.

The first form takes S = max(A @ B, 1e-8), the second S = A @ B. Where the product lies above the
floor nothing changes. Where training drove it below, the first form's weight is as good as zero,
and no second form can say that without changing other weights: the index goes to the codebook
value that comes nearest to it.

Shape legend: O out, I in, R rank, C codebook values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.grids.scalar import expand_groups
from qat.grids.scales import LowRank
from qat.model.layers import FakeQuantWeight
from qat.model.surgery import freeze_indices, quantized_layers

LEAST_NORM = 1e-30


@dataclass(slots=True)
class FloorReport:
    """What the floor's going cost."""

    num_weights: int = 0
    num_floored: int = 0
    """Weights whose scale lay below the floor."""
    largest_error: float = 0.0
    """Of a weight, in absolute value."""
    error_square: float = 0.0
    weight_square: float = 0.0

    def values(self) -> dict[str, float | int]:
        """Return the numbers of a closing line."""
        share = self.error_square / max(self.weight_square, LEAST_NORM)
        return {
            "floored_weights": self.num_floored,
            "floored_ratio": self.num_floored / max(self.num_weights, 1),
            "largest_weight_error": self.largest_error,
            "relative_square_error": share,
        }


@torch.no_grad()
def remove_floors(student: nn.Module) -> FloorReport:
    """Remove the floor of a student's scales, in place.

    Low-rank factors become unit directions and magnitudes.
    """
    report = FloorReport()
    layers = quantized_layers(student)
    if all(layer.spec.floor is None for layer in layers.values()):
        raise ValueError("no layer floors its scales: this is no student of the seeds' first form")
    for layer in layers.values():
        if layer.spec.floor is not None:
            remove_floor(layer, report)
    return report


def remove_floor(layer: FakeQuantWeight, report: FloorReport) -> None:
    """Give a layer unfloored scales, and the nearest indices where the floor held."""
    freeze_indices(layer)
    floor, expected = layer.spec.floor, layer.fake_quantized_weight()
    layer.spec = layer.spec.without_floor()
    below = layer.full_scale() < floor
    if layer.spec.rank:
        for part, values in unit_factors(layer)._asdict().items():
            getattr(layer, part).data = values
    scale = layer.full_scale()
    if scale.shape != expected.shape:
        scale, below = (expand_groups(values, expected.shape[1]) for values in (scale, below))
    codebook = layer.stored(layer.codebook)
    layer.indices[below] = nearest_at(expected[below], scale[below], codebook)
    error = layer.fake_quantized_weight() - expected
    report.num_weights += expected.numel()
    report.num_floored += int(below.sum())
    report.largest_error = max(report.largest_error, float(error.abs().max()))
    report.error_square += float(error.square().sum())
    report.weight_square += float(expected.square().sum())


def unit_factors(layer: FakeQuantWeight) -> LowRank:
    """Return the same product as unit columns, magnitudes and unit rows."""
    norm_a = layer.scale_a.norm(dim=0).clamp_min(LEAST_NORM)
    norm_b = layer.scale_b.norm(dim=1).clamp_min(LEAST_NORM)
    return LowRank(
        layer.scale_a / norm_a,
        layer.magnitude * norm_a * norm_b,
        layer.scale_b / norm_b.unsqueeze(1),
    )


def nearest_at(expected: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    """Return, for each of N weights, the index whose value times the scale is nearest, uint8."""
    distances = (scale.unsqueeze(-1) * codebook - expected.unsqueeze(-1)).abs()  # (N, C)
    return distances.argmin(-1).to(torch.uint8)
