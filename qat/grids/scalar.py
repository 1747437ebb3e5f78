"""Scalar grids: each weight takes one value of a codebook, in units of its scale.

    W_hat[o, i] = scale[o, i] * codebook[indices[o, i]] + offset[o, i]

Scale and codebook are float16 numbers held in float32, so the product of the two (22 significant
bits) is exact in float32: what training sees is what a file holds, to the bit. Most grids have no
offset.

Shape legend: O out, I in, G groups of a row, C = 2**bits codebook values.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qat.grids.packing import pack, unpack
from qat.runtime.device import is_traced

CodebookKind = Literal[
    "learned", "uniform", "balanced", "int", "uint", "iq4_nl", "mxfp4", "ternary"
]

FLOAT16_MAX = 65504.0
COUNTED = 16  # codebook values up to which compares beat a binary search, twice on a CPU
# Of ggml, kvalues_iq4nl in ggml-common.h.
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# OCP Microscaling Formats 1.0, table 5; its zero of either sign counts once.
E2M1 = (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)
LISTED_VALUES = {"iq4_nl": IQ4_NL, "mxfp4": E2M1, "ternary": (-1, 0, 1)}
# Bits per index that such a codebook comes with: blocks of TQ1_0 hold 256 weights in 52 bytes.
LISTED_BITS = {"iq4_nl": (4,), "mxfp4": (4,), "ternary": (2, 1.625)}
# Codebooks whose midpoints are multiples of one over this.
FINENESS = {"iq4_nl": 2, "mxfp4": 4}
FLOAT16_TINY = 2.0**-14  # least normal float16: below it a scale would lose bits
POWER_RANGE = (2.0**-24, 2.0**15)  # of powers of two: all that float16 holds


@dataclass(frozen=True, slots=True)
class ScalarGrid:
    """Up to 2**bits values per weight: a codebook fitted per tensor, or fixed by its kind.

    Every method takes the codebook, (C,) ascending, as the tensor holds it.
    """

    bits: int | float
    """Bits per index; the codebook has 2**bits values, 15 where it is mxfp4, 3 where ternary."""
    kind: CodebookKind = "learned"
    """learned: fitted per tensor. All others: fixed."""

    block_size: ClassVar[int] = 1
    index_dtype: ClassVar[torch.dtype] = torch.uint8

    def __post_init__(self) -> None:
        if self.kind in LISTED_BITS and self.bits not in (allowed := LISTED_BITS[self.kind]):
            count = len(LISTED_VALUES[self.kind])
            raise ValueError(
                f"codebook {self.kind} has {count} values, not 2**{self.bits}; "
                f"set bits to {allowed[0]}"
            )
        if self.kind not in LISTED_BITS and self.bits not in range(2, 9):
            raise ValueError(f"bits {self.bits} is outside 2..8; choose 2 or 4")

    @property
    def is_learned(self) -> bool:
        """Whether the codebook is fitted to the tensor and ships with it."""
        return self.kind == "learned"

    @property
    def is_signed(self) -> bool:
        """Whether a scale may be negative: these codebooks reach further on one side."""
        return self.kind in ("learned", "int", "iq4_nl")

    @property
    def num_values(self) -> int:
        """Number of codebook values."""
        return len(LISTED_VALUES[self.kind]) if self.kind in LISTED_VALUES else 2**self.bits

    @property
    def index_bits(self) -> int:
        """Bits of an index where each has its own, as in checkpoints."""
        return math.ceil(self.bits)

    @property
    def first_value(self) -> float | None:
        """The least value of a codebook whose steps are all one; None of others."""
        lowest = {"int": -(self.num_values // 2), "uint": 0, "ternary": -1}
        lowest["balanced"] = -(self.num_values - 1) / 2
        return lowest.get(self.kind)

    def has_cells(self, values: Tensor) -> bool:
        """Whether nearest values come from a table: where a program is traced, compares fuse."""
        return self.kind in FINENESS and not is_traced(values.device)

    def check(self, shape: tuple[int, int]) -> None:
        """Refuse a weight that the grid does not fit; there is none."""

    def index_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of the indices of an (O, I) weight."""
        return shape

    def size_bits(self, shape: tuple[int, int]) -> int:
        """Return the bits of an (O, I) weight's indices, and of a learned codebook in float16."""
        return math.ceil(shape[0] * shape[1] * self.bits)

    @property
    def start(self) -> "ScalarGrid":
        """The grid itself, or for a learned one the integers that it is fitted from."""
        return ScalarGrid(self.bits, "int") if self.is_learned else self

    def start_codebook(self) -> Tensor:
        """Return the values of `start`, (C,)."""
        return fixed_codebook(self.start.kind, self.bits)

    def round(
        self, normalized: Tensor, codebook: Tensor, _importance: Tensor | None = None
    ) -> Tensor:
        """Return the indices of the nearest values, uint8, of weights over their scales."""
        if (low := self.first_value) is not None:
            return nearest_step(normalized, low, self.num_values).sub_(low).to(torch.uint8)
        if self.has_cells(normalized):
            cells, _ = cell_tables(self.kind, normalized.device)
            return look_up(cells, cells_of(normalized, self.kind))
        return nearest_indices(normalized, codebook)

    def nearest(
        self, normalized: Tensor, codebook: Tensor, _importance: Tensor | None = None
    ) -> Tensor:
        """Return the nearest values themselves, without indices between."""
        if (low := self.first_value) is not None:
            return nearest_step(normalized, low, self.num_values)
        if self.has_cells(normalized):
            _, cells = cell_tables(self.kind, normalized.device)
            return look_up(cells, cells_of(normalized, self.kind))
        return nearest_values(normalized, codebook)

    def look_up(self, indices: Tensor, codebook: Tensor) -> Tensor:
        """Return the values that indices stand for, in the codebook's dtype."""
        return look_up(codebook, indices)

    def clamp(self, normalized: Tensor, codebook: Tensor) -> Tensor:
        """Return weights over their scales pulled onto the range where gradients reach them."""
        low, high = codebook_range(codebook)
        return normalized.maximum(low).minimum(high)

    def pack(self, indices: Tensor) -> Tensor:
        """Return indices as bytes."""
        return pack(indices, self.index_bits)

    def unpack(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return the (O, I) indices that bytes hold."""
        return unpack(packed, self.index_bits, shape)


def codebook_range(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ends of a codebook's range: half a step beyond its outer values."""
    low = codebook[0] - (codebook[1] - codebook[0]) / 2
    high = codebook[-1] + (codebook[-1] - codebook[-2]) / 2
    return low, high


def snap_float16(values: Tensor) -> Tensor:
    """Return the nearest float16 numbers, in the dtype of the input.

    Raises no error and saturates nothing: callers that store numbers check `fits_float16` first.
    """
    return values.to(torch.float16).to(values.dtype)


def snap_bfloat16(values: Tensor) -> Tensor:
    """Return near numbers of bfloat16 that float16 holds as well, in the dtype of the input."""
    return values.to(torch.bfloat16).to(torch.float16).to(values.dtype)


def nearest_power(values: Tensor) -> Tensor:
    """Return the nearest powers of two that float16 holds, float32; the least where not positive.

    Half of the mantissa's range is added, and what is left of the mantissa dropped.
    """
    bits = values.float().clamp(*POWER_RANGE).view(torch.int32)
    return ((bits + (1 << 22)) & ~((1 << 23) - 1)).view(torch.float32)


def exponent_bytes(powers: Tensor) -> Tensor:
    """Return powers of two as E8M0, their exponents plus 127, uint8."""
    return (powers.float().contiguous().view(torch.int32) >> 23).to(torch.uint8)


def powers_of(exponents: Tensor) -> Tensor:
    """Return the powers of two, float32, that E8M0 bytes from 1 to 254 stand for."""
    return (exponents.int() << 23).view(torch.float32)


def snap_stored(values: Tensor, stored_dtype: str) -> Tensor:
    """Return numbers as a file of that dtype holds them: float16, bfloat16 or float32."""
    if stored_dtype == "float32":
        return values
    return snap_bfloat16(values) if stored_dtype == "bfloat16" else snap_float16(values)


def fits_float16(values: Tensor) -> bool:
    """Return whether every number is finite and within float16's range."""
    low, high = values.aminmax()  # with no copy of the values; both NaN if one is
    return bool(low >= -FLOAT16_MAX) and bool(high <= FLOAT16_MAX)


def midpoints(codebook: Tensor) -> Tensor:
    """Return the C - 1 thresholds between neighbours of a sorted codebook."""
    return (codebook[1:] + codebook[:-1]) / 2


def nearest_indices(values: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the nearest codebook value, uint8; a tie goes to the lower one.

    Args:
        values: Weights divided by their scale, any shape.
        codebook: (C,), ascending.
    """
    return thresholds_below(values, codebook).to(torch.uint8)


def nearest_values(values: Tensor, codebook: Tensor) -> Tensor:
    """Return the codebook value nearest to each number; a tie goes to the lower one.

    Step by step upwards, by interpolation that is exact at its two ends: on a CPU a third of the
    time of finding indices and looking them up.
    """
    if len(codebook) > COUNTED:
        return look_up(codebook, thresholds_below(values, codebook))
    nearest, claim = torch.empty_like(values).copy_(codebook[0]), torch.empty_like(values)
    for threshold, value in zip(midpoints(codebook), codebook[1:], strict=True):
        nearest.lerp_(value, torch.gt(values, threshold, out=claim))
    return nearest


def nearest_step(values: Tensor, low: float, count: int) -> Tensor:
    """Return the nearest of low, low + 1, .. in float32; a tie goes to the lower one.

    What is no number becomes the lowest. Exact, as nothing is added before values are whole. On a
    CPU a third of the time of compares for 4 values, a tenth for 16.

    Args:
        values: Any shape.
        low: An integer, or half of an odd one.
        count: Of the steps.
    """
    nearest = values.ceil().sub_(0.5) if low % 1 else values.mul(2).ceil_().mul_(0.5).floor_()
    return nearest.nan_to_num_(nan=low).clamp_(low, low + count - 1)


def cells_of(values: Tensor, kind: str) -> Tensor:
    """Return the cell of each value, int32: between multiples of 1 / `FINENESS`, counted from 0."""
    fineness, listed = FINENESS[kind], LISTED_VALUES[kind]
    low, high = fineness * listed[0], fineness * listed[-1]
    return values.mul(fineness).ceil_().nan_to_num_(nan=low).clamp_(low, high).sub_(low).int()


@cache
def cell_tables(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the index, uint8, and the value that is nearest to all numbers of a cell.

    The upper end belongs to a cell: a tie goes to the lower value.
    """
    fineness, codebook = FINENESS[kind], torch.tensor(LISTED_VALUES[kind], dtype=torch.float32)
    low, high = fineness * float(codebook[0]), fineness * float(codebook[-1])
    ends = torch.arange(low, high + 1) / fineness
    index = torch.bucketize(ends, midpoints(codebook))
    return index.to(device, torch.uint8), codebook[index].to(device)


def thresholds_below(values: Tensor, codebook: Tensor) -> Tensor:
    """Return how many midpoints of a codebook each value lies above, an index in int32.

    Counting needs no (values x C) table of distances. Claims are kept as floats: a CPU writes
    booleans, and reads them beside floats, four times as slowly.
    """
    thresholds = midpoints(codebook)
    if len(codebook) > COUNTED:
        return torch.bucketize(values, thresholds, out_int32=True)
    count = torch.gt(values, thresholds[0], out=torch.empty_like(values))
    claim = torch.empty_like(values)
    for threshold in thresholds[1:]:
        count.add_(torch.gt(values, threshold, out=claim))
    return count.int()


def look_up(codebook: Tensor, indices: Tensor) -> Tensor:
    """Return codebook[indices] in the indices' shape; three times as quick on a CPU."""
    return codebook.index_select(0, indices.reshape(-1).int()).view(indices.shape)


def expand_groups(scale: Tensor, num_inputs: int) -> Tensor:
    """Return (O, I) scales from one scale per group, (O, G)."""
    return scale.repeat_interleave(num_inputs // scale.shape[1], dim=1)


def low_rank_scale(scale_a: Tensor, magnitude: Tensor, scale_b: Tensor) -> Tensor:
    """Return (O, I) scales (scale_a * magnitude) @ scale_b from (O, R), (R,) and (R, I)."""
    return (scale_a * magnitude) @ scale_b


def dequantize(
    indices: Tensor, scale: Tensor, codebook: Tensor, offset: Tensor | None = None
) -> Tensor:
    """Return the weights that indices stand for, in the scale's dtype.

    Args:
        indices: (O, I), any integer dtype.
        scale: (O, I), or (O, G) for one per group.
        codebook: (C,).
        offset: (O, G), added to each weight; none when not given.
    """
    return times_scale(look_up(codebook.to(scale.dtype), indices), scale, offset)


def times_scale(values: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Return values times their scales (plus offsets), (O, I), of scales (O, I) or (O, G)."""
    product = values.view(*scale.shape, -1) * scale.unsqueeze(-1)
    if offset is not None:
        product += offset.unsqueeze(-1)
    return product.view_as(values)


def over_scale(weight: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Return a weight (less its offsets) over its scales, (O, I), of scales (O, I) or (O, G)."""
    grouped = weight.view(*scale.shape, -1)
    if offset is not None:
        grouped = grouped - offset.unsqueeze(-1)
    return (grouped / scale.unsqueeze(-1)).view_as(weight)


def fixed_codebook(kind: str, bits: int | float) -> Tensor:
    """Return a codebook that is not fitted, ascending, float32.

    Args:
        kind: uniform: 2**bits values evenly on [-1, 1]. balanced: half-integers around zero
            without a zero, such as -1.5, -0.5, 0.5, 1.5. int: -2**(bits-1) .. 2**(bits-1) - 1.
            uint: 0 .. 2**bits - 1, for scales with an offset. Others: `LISTED_VALUES`.
        bits: Bits per index.
    """
    if kind in LISTED_VALUES:
        return torch.tensor(LISTED_VALUES[kind], dtype=torch.float32)
    count = 2**bits
    steps = torch.arange(count, dtype=torch.float32)
    if kind == "uniform":
        return snap_float16(torch.linspace(-1, 1, count))
    if kind == "balanced":
        return steps - (count - 1) / 2
    if kind == "int":
        return steps - count // 2
    if kind == "uint":
        return steps
    raise ValueError(
        f"codebook {kind!r} is not fixed; choose uniform, balanced, int, uint or one of "
        f"{', '.join(LISTED_VALUES)}"
    )
