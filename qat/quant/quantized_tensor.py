"""`QuantizedTensor`: indices on a grid with their scales, the same object on every path.

The fit returns it, layers hold it, checkpoints store it, exporters pack it.

Shape legend: O out, I in, G groups of a row, R rank, C codebook values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qat.grids.scalar import times_scale
from qat.grids.scales import LowRank
from qat.quant.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A weight on its grid."""

    spec: TensorSpec
    indices: Tensor
    """(O, I) uint8; blocks of several weights have an index of their own."""
    parts: Mapping[str, Tensor]
    """Scales and codebook by name, float32 numbers of the stored dtype."""

    @property
    def codebook(self) -> Tensor | None:
        """The codebook, (C,) ascending; None where the grid has none."""
        return self.parts.get("codebook")

    @property
    def scale(self) -> Tensor:
        """Group scales, (O, G)."""
        return self.parts["scale"]

    @property
    def low_rank(self) -> LowRank | None:
        """Factors of low-rank scales; None where there are groups."""
        if not self.spec.rank:
            return None
        return LowRank(*(self.parts[name] for name in LowRank._fields))

    def expand(self) -> tuple[Tensor, Tensor | None]:
        """Return scales and offsets as the grid takes them: (O, G), or (O, I) when low rank."""
        return self.spec.scale.expand(self.parts, lambda values: values)

    def full_scale(self) -> Tensor:
        """Return the scales as the grid takes them."""
        return self.expand()[0]

    def dequantize(self) -> Tensor:
        """Return W_hat, (O, I), float32."""
        scale, offset = self.expand()
        values = self.spec.grid.look_up(self.indices, self.codebook)
        return times_scale(values, scale, offset)

    def cpu(self) -> "QuantizedTensor":
        """Return the tensor in the host's memory."""
        parts = {name: values.cpu() for name, values in self.parts.items()}
        return QuantizedTensor(self.spec, self.indices.cpu(), parts)

    def split(self, sizes: Sequence[int]) -> list["QuantizedTensor"]:
        """Return runs of rows as tensors of their own, each with the whole codebook."""
        indices = self.indices.split(sizes)
        parts = {
            name: [values] * len(sizes) if name == "codebook" else values.split(sizes)
            for name, values in self.parts.items()
        }
        return [
            QuantizedTensor(
                self.spec,
                rows.clone(),
                {name: runs[number].clone() for name, runs in parts.items()},
            )
            for number, rows in enumerate(indices)
        ]

    def rows(self, chosen: Tensor) -> "QuantizedTensor":
        """Return some rows, (R,), in their order, with the whole codebook."""
        parts = {
            name: values if name == "codebook" else values[chosen]
            for name, values in self.parts.items()
        }
        return QuantizedTensor(self.spec, self.indices[chosen], parts)

    @classmethod
    def join(cls, runs: Sequence["QuantizedTensor"]) -> "QuantizedTensor":
        """Return runs of rows, of one format and codebook, as one tensor."""
        parts = {
            name: values if name == "codebook" else torch.cat([run.parts[name] for run in runs])
            for name, values in runs[0].parts.items()
        }
        return cls(runs[0].spec, torch.cat([run.indices for run in runs]), parts)

    def replaced(self, *, indices: Tensor | None = None, **parts: Tensor) -> "QuantizedTensor":
        """Return the tensor with other indices or some other parts."""
        return replace(
            self,
            indices=self.indices if indices is None else indices,
            parts={**self.parts, **parts},
        )
