"""Super-block scales: a float16 scale for many weights, a small integer for each few of them.

    scale[o, s] = super_scale[o, s's super-block] * (sub_scale[o, s] + shift) * factor
    offset[o, s] = -super_offset[o, s's super-block] * sub_offset[o, s]        in some formats

as in GGUF's K- and I-types. Sub-scales and sub-offsets are floats while they train and count as the
nearest integers of their range. The product of 11, `bits + 1` and a few more significant bits is
exact in float32, in any order, and so is its product with a grid value: only adding the offset
rounds, once, as in ggml's d * sc * q - dmin * m.

Shape legend: O out, I in, S sub-blocks of a row, B super-blocks of a row; twice as many of each
where scales and offsets stand joined, offsets last.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qat.grids.scalar import FLOAT16_MAX, snap_float16
from qat.grids.scales import Parts, Snap

SUPER_TINY = 2.0**-24  # least float16: integers up to 128 leave super-scales below its normal ones
PAIRS = (("super_scale", "sub_scale"), ("super_offset", "sub_offset"))  # float16 and integer parts
# Places of the largest sub-scale of a super-block, as shares of the range: ggml takes the top only.
TOP_SHARES = tuple(1.1 - 0.05 * step for step in range(12))


@dataclass(frozen=True, slots=True)
class SuperBlockScale:
    """Scales of sub-blocks, each a small integer times the scale of a super-block."""

    sub_block: int
    """Weights that share a sub-scale."""
    super_block: int
    """Weights that share a float16 scale."""
    sub_bits: int
    """Bits of a sub-scale, and of a sub-offset."""
    shift: float = 0.0
    """Added to a sub-scale; below zero where scales may have either sign."""
    factor: float = 1.0
    """That the product is multiplied by."""
    has_offset: bool = False
    """Whether sub-blocks have an offset too, never above zero."""

    rank: ClassVar[int] = 0
    exact_top: ClassVar[int] = 0
    floor: ClassVar[None] = None

    @property
    def group_size(self) -> int:
        """Weights of a row that share a scale."""
        return self.sub_block

    @property
    def per_super(self) -> int:
        """Sub-blocks of a super-block."""
        return self.super_block // self.sub_block

    @property
    def top(self) -> int:
        """Largest sub-scale."""
        return 2**self.sub_bits - 1

    @property
    def is_signed(self) -> bool:
        """Whether scales may have either sign."""
        return self.shift < 0

    @property
    def integer_bits(self) -> Mapping[str, int]:
        """Bits of the parts that files hold as integers."""
        return {lower: self.sub_bits for _, lower in self.pairs}

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Names of the parts: super-scales and their integers, then those of offsets."""
        return PAIRS if self.has_offset else PAIRS[:1]

    def groups_of(self, num_inputs: int) -> int:
        """Return the number of sub-scales in a row."""
        self.check((1, num_inputs))
        return num_inputs // self.sub_block

    def check(self, shape: tuple[int, int]) -> None:
        """Refuse a weight that the scales do not fit.

        Raises:
            ValueError: If a row is no whole number of super-blocks.
        """
        if shape[1] % self.super_block:
            raise ValueError(
                f"a row of {shape[1]} weights is no multiple of the {self.super_block} that share "
                "a scale; choose a format of smaller blocks such as gguf:q4_0 (32) or gguf:q2_0 "
                "(64)"
            )

    def part_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of scales of an (O, I) weight, by name."""
        sizes = [(shape[0], shape[1] // size) for size in (self.super_block, self.sub_block)]
        return {name: size for pair in self.pairs for name, size in zip(pair, sizes, strict=True)}

    def size_bits(self, shape: tuple[int, int], stored_bits: int) -> int:
        """Return the bits of an (O, I) weight's scales."""
        count = shape[0] * shape[1] * (2 if self.has_offset else 1)
        return count // self.super_block * stored_bits + count // self.sub_block * self.sub_bits

    def expand(self, parts: Parts, snap: Snap) -> tuple[Tensor, Tensor | None]:
        """Return the scale and offset of each sub-block, (O, S) each; straight through rounding."""
        found = [
            self.full(snap(parts[upper])) * self.units(self.integers(parts[lower]), lower)
            for upper, lower in self.pairs
        ]
        return found[0], found[1] if self.has_offset else None

    def full(self, supers: Tensor) -> Tensor:
        """Return the number of the super-block of each sub-block, (O, S) of (O, B)."""
        return supers.repeat_interleave(self.per_super, dim=1)

    def units(self, integers: Tensor, name: str = "sub_scale") -> Tensor:
        """Return what the integers of a part multiply the super-block's number by."""
        return -integers if name == "sub_offset" else (integers + self.shift) * self.factor

    def integers(self, values: Tensor) -> Tensor:
        """Return sub-scales or sub-offsets as integers of their range, straight through in it."""
        inside = values.clamp(0, self.top)
        return inside + (inside.round() - inside).detach()

    def storable(self, parts: Parts) -> dict[str, Tensor]:
        """Return parts that training moved out of what files hold, pulled back."""
        pulled = {}
        for upper, lower in self.pairs:
            allowed = parts[upper] if self.is_signed else parts[upper].clamp_min(0)
            half = allowed.half()
            is_lost = (half == 0) | ~torch.isfinite(half)
            pulled[upper] = stored_super(allowed).where(is_lost, parts[upper])
            pulled[lower] = parts[lower].clamp(0, self.top)
        return pulled

    def join(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """Return super-scales, and integers, of scales and offsets joined."""
        return tuple(torch.cat([parts[pair[k]] for pair in self.pairs], dim=1) for k in (0, 1))

    def split(self, supers: Tensor, integers: Tensor) -> dict[str, Tensor]:
        """Return the parts that `join` makes its results of."""
        count = len(self.pairs)
        joined = zip(self.pairs, supers.chunk(count, 1), integers.chunk(count, 1), strict=True)
        return {n: part for pair, *parts in joined for n, part in zip(pair, parts, strict=True)}

    def joined_units(self, integers: Tensor) -> Tensor:
        """Return the units of integers joined."""
        chunks = zip(self.pairs, integers.chunk(len(self.pairs), 1), strict=True)
        return torch.cat([self.units(part, lower) for (_, lower), part in chunks], dim=1)

    def joined(self, parts: Parts) -> Tensor:
        """Return scales and offsets, joined, of parts as stored."""
        supers, integers = self.join(parts)
        return self.full(supers) * self.joined_units(integers)

    def from_effective(self, aim: Tensor, mass: Tensor | None = None) -> dict[str, Tensor]:
        """Return the parts whose scales and offsets are nearest to given ones.

        Args:
            aim: Scales (and offsets) as `joined` gives them.
            mass: How much the squared error of each counts, like aim; all alike when not given.
        """
        mass = torch.ones_like(aim) if mass is None else mass
        count, found = len(self.pairs), {}
        chunks = zip(self.pairs, aim.chunk(count, 1), mass.chunk(count, 1), strict=True)
        for (upper, lower), *given in chunks:
            found[upper], found[lower] = self.nearest_parts(*given, lower)
        return found

    def nearest_parts(self, aim: Tensor, mass: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Return super-scales (O, B) and integers (O, S) near to scales, or offsets, (O, S).

        Several places of the largest integer are tried; each fixes the integers, which fix the best
        super-scale in closed form.
        """
        shape = (len(aim), -1, self.per_super)
        aim, mass = aim.reshape(shape), mass.reshape(shape)  # (O, B, S / B)
        largest = aim.abs().amax(-1, keepdim=True)
        best = least = None
        for share in TOP_SHARES:
            start = stored_super(largest / (share * self.reach(name)))
            steps = self.nearest_integers(aim, start, name)
            supers = self.best_super(aim, self.units(steps, name), mass)
            steps = self.nearest_integers(aim, supers, name)
            error = (supers * self.units(steps, name) - aim).square() * mass
            error = error.sum(-1, keepdim=True)
            if best is None:
                best, least = (supers, steps), error
                continue
            is_better = error < least
            best = tuple(
                torch.where(is_better, new, old)
                for new, old in zip((supers, steps), best, strict=True)
            )
            least = torch.minimum(error, least)
        supers, steps = best
        return supers.squeeze(-1), steps.flatten(1)

    def reach(self, name: str = "sub_scale") -> float:
        """Return the largest unit of a part."""
        return float(self.units(torch.tensor(float(self.top)), name).abs())

    def with_super_scale(self, parts: Parts, aim: Tensor, mass: Tensor) -> dict[str, Tensor]:
        """Return parts with the super-scales of least error from scales (O, S) given integers."""
        shape = (len(aim), -1, self.per_super)
        aim, units, mass = (t.reshape(shape) for t in (aim, self.units(parts["sub_scale"]), mass))
        return {**parts, "super_scale": self.best_super(aim, units, mass).squeeze(-1)}

    def nearest_integers(self, aim: Tensor, supers: Tensor, name: str = "sub_scale") -> Tensor:
        """Return the integers of a part nearest to scales, or offsets, under given super-scales."""
        units = aim / supers
        steps = -units if name == "sub_offset" else units / self.factor - self.shift
        return steps.round().clamp(0, self.top)

    def best_super(self, aim: Tensor, units: Tensor, mass: Tensor) -> Tensor:
        """Return the least-squares super-scale of units, as files hold it."""
        along = (mass * units * aim).sum(-1, keepdim=True)
        best = along / (mass * units.square()).sum(-1, keepdim=True).clamp_min(1e-30)
        return stored_super(best if self.is_signed else best.clamp_min(0))


def stored_super(supers: Tensor) -> Tensor:
    """Return super-scales on the float16 grid, none of them zero, each of the sign it had."""
    return snap_float16(supers.abs().clamp(SUPER_TINY, FLOAT16_MAX).copysign(supers))
