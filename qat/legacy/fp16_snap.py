"""Every stored number of a student onto the float16 grid, where the Neural Engine computes.

Low-rank factors are rounded once each: the magnitudes go into A first and become one, so that a
weight bears two roundings of its scale instead of three.

Shape legend: O out, I in, R rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.grids.scalar import fits_float16, snap_float16
from qat.model.checkpoint import dense_targets
from qat.model.layers import FakeQuantWeight
from qat.model.surgery import freeze_indices, quantized_layers, stored_parts


@dataclass(slots=True)
class SnapReport:
    """What rounding changed."""

    numbers: int = 0
    """Stored numbers, indices apart."""
    numbers_changed: int = 0
    numbers_lost: int = 0
    """Numbers below float16's least, now zero."""
    largest_change: float = 0.0

    def add(self, previous: Tensor, snapped: Tensor) -> None:
        """Count the numbers of a tensor."""
        change = (previous - snapped).abs()
        self.numbers += previous.numel()
        self.numbers_changed += int((change > 0).sum())
        self.numbers_lost += int(((snapped == 0) & (previous != 0)).sum())
        self.largest_change = max(self.largest_change, float(change.max()))


@torch.no_grad()
def snap_student(student: nn.Module, *, bake: bool = False) -> SnapReport:
    """Round every stored number of a student to float16, in place.

    What lies on the grid already stays as it is.

    Args:
        student: On the CPU; latent weights are replaced by their indices.
        bake: Also put magnitudes into A where everything lies on the grid already, for a form in
            which only that stays exact.
    """
    layers = quantized_layers(student)
    dense = dense_targets(student)
    for layer in layers.values():
        freeze_indices(layer)
    check_range(layers, dense, bake)
    report = SnapReport()
    for layer in layers.values():
        snap_layer(layer, report, bake=bake)
    for tensor in dense.values():
        if tensor.is_floating_point():
            report.add(tensor.float(), snap_float16(tensor).float())
            tensor.data = snap_float16(tensor.data)
    return report


def check_range(layers: dict[str, FakeQuantWeight], dense: dict[str, Tensor], bake: bool) -> None:
    """Refuse numbers that float16 does not hold, naming the tensor."""
    numbers = {
        f"{name}.{part}": values
        for name, layer in layers.items()
        for part, values in parts_to_snap(layer, bake=bake).items()
    }
    for name, values in (numbers | dense).items():
        if values.is_floating_point() and not fits_float16(values):
            raise ValueError(
                f"{name} holds NaN or values beyond 65504, which float16 cannot; "
                "scale the model down, or keep this checkpoint in float32"
            )


def snap_layer(layer: FakeQuantWeight, report: SnapReport, *, bake: bool) -> None:
    """Round a layer's scales and codebook."""
    for part, values in parts_to_snap(layer, bake=bake).items():
        snapped = snap_float16(values)
        report.add(values, snapped)
        getattr(layer, part).data = snapped
    layer.spec = layer.spec.stored_as("float16")


def parts_to_snap(layer: FakeQuantWeight, *, bake: bool) -> dict[str, Tensor]:
    """Return what is rounded, by name: scales as the forward uses them, and the codebook."""
    parts = {n: layer.spec.snap_part(n, values) for n, values in stored_parts(layer).items()}
    on_grid = all(torch.equal(snap_float16(values), values) for values in parts.values())
    if layer.spec.rank and (bake or not on_grid):
        parts["scale_a"] = parts["scale_a"] * parts["magnitude"]
        parts["magnitude"] = torch.ones_like(parts["magnitude"])
    return parts
