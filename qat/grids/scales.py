"""Scales: the least-squares scale of a group, and low-rank scales by alternating least squares.

Given the codebook value c that each weight w stands for and the importance h of its error, the best
scale of a group is closed form,

    s = sum h w c / sum h c^2,

and the best low-rank scales S = (A * g) @ B minimize sum h c^2 (w / c - S)^2, which is linear in
each row of A for fixed B and in each column of B for fixed A. All rows are solved in one batch:
their R x R normal matrices come from one product with the table of outer products.

Shape legend: O out, I in, G groups of a row, R rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from qat.grids.scalar import (
    FLOAT16_MAX,
    FLOAT16_TINY,
    POWER_RANGE,
    fits_float16,
    low_rank_scale,
    nearest_power,
    snap_float16,
    times_scale,
)
from qat.runtime.device import seeded

RIDGE = 1e-6  # of the mean diagonal: keeps nearly collinear factors solvable in float32
# Largest value of the best even grid of 2**bits values for a Gaussian of deviation one, half a step
# further out on one side as integer grids are (Max 1960, table II); 1: three values.
GAUSSIAN_REACH = {1: 1.2, 2: 2.0, 3: 2.3, 4: 2.7, 5: 3.0, 6: 3.3, 7: 3.6, 8: 3.9}
SEARCH_FACTORS = (0.75, 1.0, 1.3)


class LowRank(NamedTuple):
    """Factors of S = (scale_a * magnitude) @ scale_b; unit columns in A, unit rows in B."""

    scale_a: Tensor  # (O, R)
    magnitude: Tensor  # (R,)
    scale_b: Tensor  # (R, I)


Snap = Callable[[Tensor], Tensor]
Parts = Mapping[str, Tensor]
EXPONENT_BITS = 8
FLOAT16_INTEGERS = 2048  # all up to it are numbers of float16
FLOAT16_STEP = 2.0**-24  # between its least numbers
TENSOR_BLOCK, TENSOR_TAIL_BYTES = 128, 32  # of I2_S: weights in a block, bytes behind the last
NO_INTEGERS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class GroupScale:
    """One scale for each group of a row's weights, and an offset where the format stores one."""

    group_size: int = 32
    """Weights of a row that share a scale; 0 = the whole row."""
    has_offset: bool = False
    """Whether each group also has an offset: W_hat = scale * value + offset."""
    floor: float | None = None
    """A scale below it counts as it, as in checkpoints of the seeds' first form; None = as is."""
    is_power: bool = False
    """Whether a scale is a power of two, of which files hold the exponent in a byte."""
    exact_top: int = 0
    """Largest index of a runtime that multiplies and adds in float16: scales and offsets are then
    such that neither step rounds for any index. 0 = any numbers of the stored dtype."""

    rank: ClassVar[int] = 0
    integer_bits: ClassVar[Mapping[str, int]] = NO_INTEGERS  # of parts that files hold as integers

    def __post_init__(self) -> None:
        if self.group_size < 0:
            raise ValueError(f"group size {self.group_size} must be 0 or more")

    def groups_of(self, num_inputs: int) -> int:
        """Return the number of scales in a row.

        Raises:
            ValueError: If the group size does not divide the row.
        """
        group_size = self.group_size or num_inputs
        if num_inputs % group_size:
            raise ValueError(
                f"group size {group_size} does not divide a row of {num_inputs} weights; "
                f"choose a divisor such as {largest_divisor(num_inputs, group_size)}"
            )
        return num_inputs // group_size

    def check(self, shape: tuple[int, int]) -> None:
        """Refuse a weight that the scales do not fit."""
        self.groups_of(shape[1])

    def part_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of scales of an (O, I) weight, by name."""
        groups = (shape[0], self.groups_of(shape[1]))
        return {"scale": groups, "offset": groups} if self.has_offset else {"scale": groups}

    def size_bits(self, shape: tuple[int, int], stored_bits: int) -> int:
        """Return the bits of an (O, I) weight's scales."""
        scale_bits = EXPONENT_BITS if self.is_power else stored_bits
        offset_bits = stored_bits if self.has_offset else 0
        return (scale_bits + offset_bits) * shape[0] * self.groups_of(shape[1])

    def expand(self, parts: Parts, snap: Snap) -> tuple[Tensor, Tensor | None]:
        """Return scales and offsets, (O, G) each, as stored; no offsets where there are none."""
        scale = straight_to_power(parts["scale"]) if self.is_power else snap(parts["scale"])
        if self.floor is not None:
            scale = scale.clamp_min(self.floor)
        if not self.has_offset:
            return scale, None
        return self.computed(scale, snap(parts["offset"]))

    def computed(self, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Return scales and offsets, (O, G) each, that the runtime computes with, straight through.

        What it cannot compute with exactly moves by less than a thousandth of the group's reach,
        before the fit chooses indices.
        """
        if not self.exact_top:
            return scale, offset
        exact = exact_in_float16(scale.detach(), offset.detach(), self.exact_top)
        return tuple(
            part + (new - part).detach() for part, new in zip((scale, offset), exact, strict=True)
        )

    def storable(self, parts: Parts) -> dict[str, Tensor]:
        """Return scales that training drove to where no gradient leads back from, pulled back."""
        if self.is_power:
            return {"scale": parts["scale"].clamp(*POWER_RANGE)}
        return {} if self.floor is None else {"scale": parts["scale"].clamp_min(self.floor)}

    def stored(self, scale: Tensor) -> Tensor:
        """Return the nearest scales of the form: powers of two, or normal numbers of float16."""
        return nearest_power(scale) if self.is_power else stored_scale(scale)


PLAIN = GroupScale()


@dataclass(frozen=True, slots=True)
class TensorScale(GroupScale):
    """One scale for all weights of a tensor, as BitNet's I2_S has it.

    Parts hold it once for each row, all alike: it trains and is snapped as a row's scale is.
    """

    group_size: int = 0

    def check(self, shape: tuple[int, int]) -> None:
        """Refuse a weight whose rows are no whole blocks."""
        if shape[1] % TENSOR_BLOCK:
            raise ValueError(
                f"rows of {shape[1]} weights are no multiple of {TENSOR_BLOCK}, which one scale a "
                "tensor takes; choose gguf:tq2_0 or ternary2-row"
            )

    def size_bits(self, shape: tuple[int, int], stored_bits: int) -> int:
        """Return the bits behind an (O, I) weight's indices: a float32 number and its padding."""
        return 8 * TENSOR_TAIL_BYTES

    def expand(self, parts: Parts, snap: Snap) -> tuple[Tensor, None]:
        """Return the scale of each row, (O, 1), all alike, and no offset."""
        scale = parts["scale"]
        mean = scale[:1] + (scale - scale[:1]).mean()  # to the bit where all are alike
        return snap(mean).expand_as(scale), None


@dataclass(frozen=True, slots=True)
class LowRankScale:
    """A scale for every weight, of low rank: S = (scale_a * magnitude) @ scale_b."""

    rank: int
    floor: float | None = None
    """A scale below it counts as it, as in checkpoints of the seeds' first form; None = as is."""

    group_size: ClassVar[int] = 0
    has_offset: ClassVar[bool] = False
    exact_top: ClassVar[int] = 0
    integer_bits: ClassVar[Mapping[str, int]] = NO_INTEGERS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank {self.rank} must be 1 or more")

    def check(self, shape: tuple[int, int]) -> None:
        """Refuse a weight that the scales do not fit.

        Raises:
            ValueError: If the rank exceeds a side.
        """
        if self.rank > min(shape):
            raise ValueError(
                f"rank {self.rank} exceeds the smaller side of a {tuple(shape)} weight; "
                f"choose at most {min(shape)}"
            )

    def part_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each factor of an (O, I) weight, by name."""
        return {
            "scale_a": (shape[0], self.rank),
            "magnitude": (self.rank,),
            "scale_b": (self.rank, shape[1]),
        }

    def size_bits(self, shape: tuple[int, int], stored_bits: int) -> int:
        """Return the bits of an (O, I) weight's factors."""
        return stored_bits * self.rank * (shape[0] + shape[1] + 1)

    def expand(self, parts: Parts, snap: Snap) -> tuple[Tensor, None]:
        """Return one scale per weight, (O, I), of factors as stored, and no offset."""
        factors = (snap(parts[name]) for name in LowRank._fields)
        scale = low_rank_scale(*factors)
        return scale if self.floor is None else scale.clamp_min(self.floor), None

    def pull(self, parts: Parts, d_scale: Tensor) -> dict[str, Tensor]:
        """Return each factor's gradient from that of the scales, without forming them.

        The products run in the dtype of `d_scale`; snapping is straight-through.

        Args:
            parts: Factors as stored, float32.
            d_scale: dL/dS, (O, I), zero where a floor holds.
        """
        scale_a, magnitude, scale_b = (parts[name] for name in LowRank._fields)
        d_rows = (d_scale @ scale_b.T.to(d_scale.dtype)).float()  # (O, R)
        rows = (scale_a * magnitude).T.to(d_scale.dtype)
        return {
            "scale_a": d_rows * magnitude,
            "magnitude": (d_rows * scale_a).sum(0),
            "scale_b": (rows @ d_scale).float(),
        }

    def storable(self, _parts: Parts) -> dict[str, Tensor]:
        """Return nothing: factors may have any value."""
        return {}


def largest_divisor(number: int, at_most: int) -> int:
    """Return the largest divisor of `number` that does not exceed `at_most`."""
    return next(d for d in range(min(number, at_most), 0, -1) if number % d == 0)


def start_scale(weight: Tensor, importance: Tensor, num_groups: int) -> Tensor:
    """Return the importance-weighted root mean square of each group, (O, G), as stored."""
    return stored_scale(root_mean_square(weight, importance, num_groups))


def root_mean_square(weight: Tensor, importance: Tensor, num_groups: int) -> Tensor:
    """Return the importance-weighted root mean square of each group, (O, G)."""
    grouped = weight.view(weight.shape[0], num_groups, -1)
    mass = importance.view(1, num_groups, -1)
    mean_square = (grouped.square() * mass).sum(-1) / mass.sum(-1).clamp_min(1e-30)
    return mean_square.sqrt()


def group_error(
    weight: Tensor,
    values: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    *,
    importance: Tensor,
) -> Tensor:
    """Return the importance-weighted squared error of each group, (O, G)."""
    error = weight - times_scale(values, scale, offset)
    return (error.square() * importance).view(*scale.shape, -1).sum(-1)


def fit_group_scale(
    weight: Tensor,
    values: Tensor,
    importance: Tensor,
    former: Tensor,
    *,
    is_signed: bool = False,
    form: GroupScale = PLAIN,
) -> Tensor:
    """Return the least-squares scale of each group, as its form stores it.

    A group whose best scale is not of the sign allowed keeps its former one: that never raises the
    error above what it was, and no sign flips unnoticed.

    Args:
        weight: (O, I).
        values: Codebook value of each weight, (O, I).
        importance: (I,).
        former: Scale that the values were chosen with, (O, G).
        is_signed: Whether a scale may be negative.
        form: Of the scales.
    """
    num_groups = former.shape[1]
    weighted = (values * importance).view(weight.shape[0], num_groups, -1)
    grouped_weight = weight.view(weight.shape[0], num_groups, -1)
    grouped_values = values.view(weight.shape[0], num_groups, -1)
    along = (weighted * grouped_weight).sum(-1)
    square = (weighted * grouped_values).sum(-1)
    fitted = along / square.clamp_min(1e-30)
    return nearest_stored_scale(fitted, former, is_signed=is_signed, form=form)


def fit_offset(
    weight: Tensor, values: Tensor, importance: Tensor, previous: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the least-squares scale and offset of each group, on the float16 grid.

    A group whose best scale is not positive keeps its previous pair.

    Args:
        weight: (O, I).
        values: Codebook value of each weight, (O, I).
        importance: (I,).
        previous: Scale and offset that the values were chosen with, (O, G) each.
    """
    shape = (*previous[0].shape, -1)
    mass = importance.view(1, shape[1], -1)
    w, c = weight.view(shape), values.view(shape)
    total = mass.sum(-1).clamp_min(1e-30)
    mean_w, mean_c = (w * mass).sum(-1) / total, (c * mass).sum(-1) / total
    centered = (c - mean_c.unsqueeze(-1)) * mass
    slope = (centered * w).sum(-1) / (centered * c).sum(-1).clamp_min(1e-30)
    is_better = (slope > 0) & torch.isfinite(slope)
    scale = stored_scale(torch.where(is_better, slope, previous[0]))
    return scale, snap_float16(torch.where(is_better, mean_w - scale * mean_c, previous[1]))


def next_power(values: Tensor) -> Tensor:
    """Return the least powers of two that are not below normal positive numbers, float32.

    By the bits of a number, where other ways are not exact on every device.
    """
    bits = values.float().contiguous().view(torch.int32)
    return ((bits + ((1 << 23) - 1)) & ~((1 << 23) - 1)).view(torch.float32)


def exact_in_float16(scale: Tensor, offset: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return near pairs for which index * scale and that plus offset are numbers of float16.

    Both are multiples of the least power of two of which 2048 reach the group's largest number:
    float16 holds every such multiple.

    Args:
        scale: (O, G), positive.
        offset: (O, G).
        top: Largest index.
    """

    def reach(scale: Tensor, offset: Tensor) -> Tensor:
        last = top * scale
        return torch.maximum(torch.maximum(offset.abs(), (offset + last).abs()), last)

    def multiples(unit: Tensor) -> tuple[Tensor, Tensor]:
        return (scale / unit).round().clamp_min(1) * unit, (offset / unit).round() * unit

    unit = next_power(reach(scale, offset) / FLOAT16_INTEGERS).clamp_min(FLOAT16_STEP)
    pair = multiples(unit)
    is_beyond = reach(*pair) > FLOAT16_INTEGERS * unit
    wider = multiples(2 * unit)
    return tuple(torch.where(is_beyond, w, p) for w, p in zip(wider, pair, strict=True))


def nearest_stored_scale(
    fitted: Tensor, former: Tensor, *, is_signed: bool, form: GroupScale = PLAIN
) -> Tensor:
    """Return fitted scales as they are stored; the former one where no such scale is near.

    Args:
        fitted: (O, G), any numbers.
        former: (O, G), as stored.
        is_signed: Whether a scale may be negative.
        form: Of the scales.
    """
    allowed = (fitted != 0) if is_signed else (fitted > 0)
    return form.stored(torch.where(allowed & torch.isfinite(fitted), fitted, former))


def straight_to_power(scale: Tensor) -> Tensor:
    """Return the nearest powers of two, straight through inside their range."""
    inside = scale.clamp(*POWER_RANGE)
    return inside + (nearest_power(inside) - inside).detach()


def stored_scale(scale: Tensor) -> Tensor:
    """Return scales on the float16 grid, inside its normal range, each of the sign it had."""
    return snap_float16(scale.abs().clamp(FLOAT16_TINY, FLOAT16_MAX).copysign(scale))


def start_low_rank(scale: Tensor, rank: int) -> LowRank:
    """Return the rank-R approximation of an (O, I) scale matrix, found without a full SVD."""
    with seeded(scale.device, 0):  # svd_lowrank draws a test matrix: the result must not vary
        left, singular, right = torch.svd_lowrank(scale, q=min(rank + 4, *scale.shape), niter=4)
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
