"""Vector grids: a block of weights takes one point of a table together, and a sign for each weight.

    W_hat[block] = scale * points[index] * signs

Points are magnitudes. For weights v over their scale with importances h, the nearest point is

    argmin over g of sum h (|v| - g)^2 = argmax over g of 2 (h |v|) . g - h . g^2

which is one product with a table, and the sign of each weight is that of v. The index of a block
holds the point in its low bits and the signs above them, the first weight's lowest.

Shape legend: O out, I in, N blocks, D weights of a block, P points.

Source: the IQ2 and IQ3 types of ggml (ggml-common.h).
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from qat.grids.packing import pack, unpack
from qat.runtime.device import numbers_at_once

BYTE = 8
PART = 32  # points whose best score is found together, see `first_best`


@dataclass(frozen=True, slots=True)
class PointTable:
    """Sizes of a GGUF type's table of points; its values come from the `gguf` package."""

    dimension: int
    """Weights of a point."""
    point_bits: int
    """The table has 2**point_bits points."""
    reach: float
    """Largest magnitude and half a step beyond it, where gradients end."""
    search_ratios: tuple[float, ...]
    """Root mean squares of weights over their scale that a fit tries: of most points in the middle,
    the outer ones suit uneven importances."""


POINT_TABLES = {
    "iq2_s": PointTable(
        dimension=8,
        point_bits=10,
        reach=52.0,
        search_ratios=(14.0, 16.0, 18.0, 20.0, 22.0, 25.0, 29.0, 34.0),
    )
}


@dataclass(frozen=True, slots=True)
class VectorGrid:
    """Points that the weights of a block take together, with free signs.

    It has no codebook: methods take None in the place of one, as `ScalarGrid` takes a tensor.
    """

    kind: str
    """A key of `POINT_TABLES`: the GGUF type whose points they are."""

    index_dtype: ClassVar[torch.dtype] = torch.int32
    is_learned: ClassVar[bool] = False
    is_signed: ClassVar[bool] = False
    num_values: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.kind not in POINT_TABLES:
            raise ValueError(f"grid {self.kind!r} is unknown; choose {', '.join(POINT_TABLES)}")

    @property
    def table(self) -> PointTable:
        """Sizes of the table of points."""
        return POINT_TABLES[self.kind]

    @property
    def block_size(self) -> int:
        """Weights that are rounded together."""
        return self.table.dimension

    @property
    def bits(self) -> float:
        """Bits of indices per weight."""
        return self.index_bits / self.block_size

    @property
    def index_bits(self) -> int:
        """Bits of a block's index: its point and a sign for each weight."""
        return self.table.point_bits + self.block_size

    def check(self, shape: tuple[int, int]) -> None:
        """Refuse a weight whose rows are no whole number of blocks."""
        if shape[1] % self.block_size:
            raise ValueError(
                f"{self.kind} rounds {self.block_size} weights together, which does not divide a "
                f"row of {shape[1]}; choose a scalar grid such as int4-g32"
            )

    def index_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of the indices of an (O, I) weight: one for each block."""
        return shape[0], shape[1] // self.block_size

    def size_bits(self, shape: tuple[int, int]) -> int:
        """Return the bits of an (O, I) weight's indices."""
        return shape[0] * shape[1] // self.block_size * self.index_bits

    def start_codebook(self) -> None:
        """Return None: there is no codebook."""

    def round(
        self, normalized: Tensor, codebook: None = None, importance: Tensor | None = None
    ) -> Tensor:
        """Return the indices of the nearest points, (O, I / D), int32.

        Args:
            normalized: Weights over their scales, (O, I).
            codebook: None.
            importance: How much each weight's squared error counts, (I,) or (O, I); all alike when
                not given.
        """
        blocks = normalized.reshape(-1, self.block_size)  # (N, D)
        points = self.nearest_points(blocks.abs(), importance)
        places = torch.arange(self.block_size, device=blocks.device, dtype=torch.int32)
        signs = ((blocks < 0).int() << places).sum(-1, dtype=torch.int32)
        index = points.int() | (signs << self.table.point_bits)
        return index.view(self.index_shape(tuple(normalized.shape)))

    def nearest_points(self, magnitudes: Tensor, importance: Tensor | None) -> Tensor:
        """Return the point nearest to each block of magnitudes (N, D), (N,)."""
        table = point_values(self.kind, magnitudes.device)  # (P, D)
        num_blocks, device = len(magnitudes), magnitudes.device
        step = max(1, min(num_blocks, numbers_at_once(device) // len(table)))
        products = torch.cat([2 * table, -table.square()], dim=1).T  # (2D, P)
        mass = torch.ones_like(table[:1]) if importance is None else importance
        mass = mass.reshape(-1, self.block_size)
        is_repeated = len(mass) < num_blocks  # one importance for each input, for all rows
        if is_repeated:
            step = max(step // len(mass), 1) * len(mass)
            mass = mass.repeat(step // len(mass), 1)
        # One buffer for all chunks: fresh memory of this size costs more than the product.
        scores = torch.empty(min(step, num_blocks), len(table), device=device)
        found = torch.empty(num_blocks, dtype=torch.int64, device=device)
        for first in range(0, num_blocks, step):
            blocks = magnitudes[first : first + step]
            chunk = mass[: len(blocks)] if is_repeated else mass[first : first + step]
            out = scores[: len(blocks)]
            torch.mm(torch.cat([chunk * blocks, chunk], dim=1), products, out=out)
            found[first : first + step] = first_best(out)
        return found

    def nearest(
        self, normalized: Tensor, codebook: None = None, importance: Tensor | None = None
    ) -> Tensor:
        """Return the nearest points' values with their signs, (O, I), float32."""
        return self.look_up(self.round(normalized, codebook, importance))

    def look_up(self, indices: Tensor, _codebook: None = None) -> Tensor:
        """Return the values that indices stand for, (O, I), float32."""
        flat = indices.reshape(-1).int()
        bits = self.table.point_bits
        values = point_values(self.kind, indices.device).index_select(0, flat & (2**bits - 1))
        places = torch.arange(bits, self.index_bits, device=indices.device, dtype=torch.int32)
        signs = 1.0 - 2.0 * ((flat.unsqueeze(1) >> places) & 1)
        return values.mul_(signs).view(len(indices), -1)

    def clamp(self, normalized: Tensor, _codebook: None = None) -> Tensor:
        """Return weights over their scales pulled onto the range where gradients reach them."""
        return normalized.clamp(-self.table.reach, self.table.reach)

    def pack(self, indices: Tensor) -> Tensor:
        """Return indices as bytes: all lowest 8 bits, then the next 8, then what is left."""
        return torch.cat(
            [pack((indices >> first) & (2**bits - 1), bits) for first, bits in self.planes()]
        )

    def unpack(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return the (O, I / D) indices of an (O, I) weight that bytes hold."""
        index_shape = self.index_shape(shape)
        count = index_shape[0] * index_shape[1]
        sizes = [-(-count * bits // BYTE) for _, bits in self.planes()]
        if len(packed) != sum(sizes):
            raise ValueError(
                f"{len(packed)} bytes do not hold {count} indices of {self.index_bits} bits; "
                "the file is damaged"
            )
        indices = torch.zeros(index_shape, dtype=torch.int32)
        for (first, bits), part in zip(self.planes(), packed.split(sizes), strict=True):
            indices |= unpack(part, bits, index_shape).int() << first
        return indices

    def planes(self) -> list[tuple[int, int]]:
        """Return the first bit and the number of bits of each part of an index in files."""
        return [
            (first, min(BYTE, self.index_bits - first)) for first in range(0, self.index_bits, BYTE)
        ]


@cache
def point_values(kind: str, device: torch.device) -> Tensor:
    """Return the points of a GGUF type, (P, D), float32."""
    import gguf

    reader = getattr(gguf.quants, kind.upper())
    reader.init_grid()
    points = torch.from_numpy(reader.grid.copy()).float()
    return points.view(-1, POINT_TABLES[kind].dimension).to(device)


def first_best(scores: Tensor) -> Tensor:
    """Return the position of each row's largest score, (N,) of (N, P).

    In two stages, as a CPU finds a maximum 30 times as fast as its position.
    """
    num_rows = len(scores)
    parts = scores.view(num_rows, -1, PART)
    part = parts.amax(-1).argmax(-1)
    rows = torch.arange(num_rows, device=scores.device)
    return part * PART + parts[rows, part].argmax(-1)
