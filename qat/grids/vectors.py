"""Vector grids: a few weights take one point of a table together, and a sign for each weight.

    W_hat[block] = scale * points[index] * signs

Points are magnitudes. For weights v over their scale with importances h, the nearest point is

    argmin over g of sum h (|v| - g)^2 = argmax over g of 2 (h |v|) . g - h . g^2

which is one product with a table, and the sign of each weight is that of v. Where the signs of a
block must be even in number, another sign than that of v costs 4 h |v| g more: of blocks with an
odd number each of the weights of least h |v| is turned in turn, its point found anew as for -|v|.
The index of a block holds its points in the low bits and the signs above them, the first lowest.

Shape legend: O out, I in, N blocks, B weights of a block, D weights of a point, P points.

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
TURNED = 2  # weights of a block whose sign is turned: all 8 lower the error by 0.1% more
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
    ratios: tuple[float, float]
    """Least and largest root mean square of weights over their scale that a fit tries."""
    num_points: int = 1
    """Points of a block."""
    has_even_signs: bool = False
    """Whether an even number of a block's weights is negative, so that the last sign is known."""


POINT_TABLES = {
    "iq2_xxs": PointTable(8, 8, 52.0, (8.0, 45.0), has_even_signs=True),
    "iq2_xs": PointTable(8, 9, 52.0, (8.0, 45.0), has_even_signs=True),
    "iq2_s": PointTable(8, 10, 52.0, (8.0, 45.0)),
    "iq3_xxs": PointTable(4, 8, 67.0, (10.0, 56.0), num_points=2, has_even_signs=True),
    "iq3_s": PointTable(4, 9, 16.0, (2.7, 14.0)),
}


@dataclass(frozen=True, slots=True)
class VectorGrid:
    """Points that the weights of a block take together, with signs.

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
        return self.table.dimension * self.table.num_points

    @property
    def bits(self) -> float:
        """Bits of indices per weight."""
        return self.index_bits / self.block_size

    @property
    def sign_place(self) -> int:
        """First bit of a block's signs in its index."""
        return self.table.point_bits * self.table.num_points

    @property
    def index_bits(self) -> int:
        """Bits of a block's index: its points and the signs that are free."""
        return self.sign_place + self.block_size - self.table.has_even_signs

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
        """Return the indices of the nearest points, (O, I / B), int32.

        Args:
            normalized: Weights over their scales, (O, I).
            codebook: None.
            importance: How much each weight's squared error counts, (I,) or (O, I); all alike when
                not given.
        """
        magnitudes, is_negative = self.sign_choices(normalized, importance, TURNED)
        points, score = self.nearest_points(magnitudes, importance, len(normalized))
        signs = joined(is_negative.int(), 1) & (2 ** (self.index_bits - self.sign_place) - 1)
        found = joined(points.int(), self.table.point_bits) | (signs << self.sign_place)
        if self.table.has_even_signs:
            choice = score.view(TURNED, -1).argmax(0, keepdim=True)
            found = found.view(TURNED, -1).gather(0, choice)
        return found.view(self.index_shape(tuple(normalized.shape)))

    def best_scores(self, normalized: Tensor, importance: Tensor | None = None) -> Tensor:
        """Return how much less than sum h v^2 the error of each rounded block is, (O, I / B).

        To compare scales by: of the signs that may be turned only the first is.

        Args:
            normalized: As in `round`.
            importance: As in `round`.
        """
        magnitudes, _ = self.sign_choices(normalized, importance, 1)
        score = self.nearest_points(magnitudes, importance, len(normalized), scores_only=True)[1]
        return score.view(self.index_shape(tuple(normalized.shape)))

    def sign_choices(
        self, normalized: Tensor, importance: Tensor | None, num_turned: int
    ) -> tuple[Tensor, Tensor]:
        """Return what blocks are under the signs to try, (C N, B), and which are negative.

        All blocks under the first choice come first; where any signs will do, there is one choice.
        """
        blocks = normalized.reshape(-1, self.block_size)
        magnitudes, is_negative = blocks.abs(), blocks < 0
        if not self.table.has_even_signs:
            return magnitudes, is_negative
        cost = magnitudes if importance is None else (normalized.abs() * importance).view_as(blocks)
        turned = cost.topk(num_turned, dim=-1, largest=False).indices.T.unsqueeze(-1)  # (C, N, 1)
        is_odd = is_negative.sum(-1, keepdim=True) % 2 == 1
        flip = (torch.arange(self.block_size, device=blocks.device) == turned) & is_odd  # (C, N, B)
        magnitudes = torch.where(flip, -magnitudes, magnitudes)
        size = (-1, self.block_size)
        return magnitudes.reshape(size), (is_negative ^ flip).reshape(size)

    def nearest_points(
        self,
        magnitudes: Tensor,
        importance: Tensor | None,
        num_rows: int,
        *,
        scores_only: bool = False,
    ) -> tuple[Tensor | None, Tensor]:
        """Return the points nearest to each block (C N, B), and their scores.

        Args:
            magnitudes: Negative where the sign of a weight is not its own.
            importance: As in `round`.
            num_rows: O.
            scores_only: Leave the points out; finding a maximum's position is slow.

        Returns:
            Points, (C N, points of a block), and sum h v^2 less the error they leave, (C N,).
        """
        table = point_values(self.kind, magnitudes.device)  # (P, D)
        vectors = magnitudes.reshape(-1, self.table.dimension)
        mass = torch.ones_like(table[0]) if importance is None else importance
        if importance is not None:
            mass = mass.expand(num_rows, -1).reshape(-1, self.table.dimension)
            mass = mass.repeat(len(vectors) // len(mass), 1)  # for every choice
        pairs = torch.cat([mass * vectors, mass.expand_as(vectors)], dim=1)  # (V, 2D)
        products = torch.cat([2 * table, -table.square()], dim=1).T  # (2D, P)
        step = max(1, min(len(pairs), numbers_at_once(table.device) // len(table)))
        # One buffer for all chunks: fresh memory of this size costs more than the product.
        buffer = torch.empty(step, len(table), device=table.device)
        found, score = [], []
        for chunk in pairs.split(step):
            out = torch.mm(chunk, products, out=buffer[: len(chunk)])
            if scores_only:
                score.append(out.amax(-1))
                continue
            point, most = first_best(out)
            found.append(point)
            score.append(most)
        per_block = (-1, self.table.num_points)
        points = None if scores_only else torch.cat(found).view(per_block)
        return points, torch.cat(score).view(per_block).sum(-1)

    def nearest(
        self, normalized: Tensor, codebook: None = None, importance: Tensor | None = None
    ) -> Tensor:
        """Return the nearest points' values with their signs, (O, I), float32."""
        return self.look_up(self.round(normalized, codebook, importance))

    def look_up(self, indices: Tensor, _codebook: None = None) -> Tensor:
        """Return the values that indices stand for, (O, I), float32."""
        table, flat = self.table, indices.reshape(-1, 1).int()
        place = torch.arange(self.index_bits, device=indices.device, dtype=torch.int32)
        first = place[: self.sign_place : table.point_bits]
        points = (flat >> first) & (2**table.point_bits - 1)  # (N, points of a block)
        values = point_values(self.kind, indices.device).index_select(0, points.view(-1))
        signs = (flat >> place[self.sign_place :]) & 1
        if table.has_even_signs:
            signs = torch.cat([signs, signs.sum(-1, keepdim=True) & 1], dim=1)
        values = values.view(-1, self.block_size)  # (N, B)
        return values.mul_(1.0 - 2.0 * signs).view(len(indices), -1)

    def clamp(self, normalized: Tensor, _codebook: None = None) -> Tensor:
        """Return weights over their scales pulled onto the range where gradients reach them."""
        return normalized.clamp(-self.table.reach, self.table.reach)

    def pack(self, indices: Tensor) -> Tensor:
        """Return indices as bytes: all lowest 8 bits, then the next 8, then what is left."""
        return torch.cat(
            [pack((indices >> first) & (2**bits - 1), bits) for first, bits in self.planes()]
        )

    def unpack(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return the (O, I / B) indices of an (O, I) weight that bytes hold."""
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


def joined(fields: Tensor, bits: int) -> Tensor:
    """Return fields of a few bits as one number, (N,) int32 of (N, fields), the first lowest."""
    places = torch.arange(fields.shape[1], device=fields.device, dtype=torch.int32) * bits
    return (fields << places).sum(-1, dtype=torch.int32)


def first_best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the position of each row's largest score, (N,) of (N, P), and the score.

    In two stages, as a CPU finds a maximum 30 times as fast as its position.
    """
    num_rows = len(scores)
    parts = scores.view(num_rows, -1, PART)
    best, part = parts.amax(-1).max(-1)
    rows = torch.arange(num_rows, device=scores.device)
    return part * PART + parts[rows, part].argmax(-1), best
