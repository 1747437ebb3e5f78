"""Super-block scales: a float16 scale for many weights, a small integer for each few of them.

    scale[o, s] = super_scale[o, s's super-block] * (sub_scale[o, s] + shift) * factor

as in GGUF's K- and I-types. `sub_scale` is a float while it trains and counts as the nearest
integer of its range.  The product of 11, `bits + 1` and a few more significant bits is exact in
float32, in any order.

Shape legend: O out, I in, S sub-blocks of a row, B super-blocks of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qat.grids.scalar import FLOAT16_MAX, snap_float16
from qat.grids.scales import Parts, Snap

SUPER_TINY = 2.0**-24  # least float16: integers leave super-scales of small weights below normal
# Places of the largest sub-scale of a super-block, as shares of the range: ggml takes the top only.
TOP_SHARES = tuple(1.1 - 0.05 * step for step in range(12))


@dataclass(frozen=True, slots=True)
class SuperBlockScale:
    """Positive scales of sub-blocks, each a small integer times the scale of a super-block."""

    sub_block: int
    """Weights that share a sub-scale."""
    super_block: int
    """Weights that share a float16 scale."""
    sub_bits: int
    """Bits of a sub-scale."""
    shift: float
    """Added to a sub-scale."""
    factor: float
    """That the product is multiplied by."""

    rank: ClassVar[int] = 0
    floor: ClassVar[None] = None
    has_offset: ClassVar[bool] = False

    @property
    def group_size(self) -> int:
        """Weights of a row that share a scale."""
        return self.sub_block

    @property
    def top(self) -> int:
        """Largest sub-scale."""
        return 2**self.sub_bits - 1

    @property
    def integer_bits(self) -> Mapping[str, int]:
        """Bits of the parts that files hold as integers."""
        return {"sub_scale": self.sub_bits}

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
        return {
            "super_scale": (shape[0], shape[1] // self.super_block),
            "sub_scale": (shape[0], shape[1] // self.sub_block),
        }

    def size_bits(self, shape: tuple[int, int], stored_bits: int) -> int:
        """Return the bits of an (O, I) weight's scales."""
        count = shape[0] * shape[1]
        return count // self.super_block * stored_bits + count // self.sub_block * self.sub_bits

    def expand(self, parts: Parts, snap: Snap) -> tuple[Tensor, None]:
        """Return the scale of each sub-block, (O, S), and no offset; straight through rounding."""
        return self.product(snap(parts["super_scale"]), self.integers(parts["sub_scale"])), None

    def product(self, super_scale: Tensor, sub_scale: Tensor) -> Tensor:
        """Return the scale of each sub-block, (O, S)."""
        full = super_scale.repeat_interleave(self.super_block // self.sub_block, dim=1)
        return full * ((sub_scale + self.shift) * self.factor)

    def integers(self, sub_scale: Tensor) -> Tensor:
        """Return sub-scales as integers of their range, straight through inside it."""
        inside = sub_scale.clamp(0, self.top)
        return inside + (inside.round() - inside).detach()

    def storable(self, parts: Parts) -> dict[str, Tensor]:
        """Return parts that training moved out of what files hold, pulled back."""
        allowed = parts["super_scale"].clamp_min(0)
        is_lost = (allowed.half() == 0) | ~torch.isfinite(allowed.half())
        return {
            "super_scale": stored_super(allowed).where(is_lost, parts["super_scale"]),
            "sub_scale": parts["sub_scale"].clamp(0, self.top),
        }

    def from_effective(self, scale: Tensor, mass: Tensor | None = None) -> dict[str, Tensor]:
        """Return the parts whose scales are nearest to given ones.

        Several places of the largest sub-scale are tried; each fixes the integers, which fix the
        best super-scale in closed form.

        Args:
            scale: (O, S), positive.
            mass: How much the squared error of each scale counts, (O, S); all alike when not given.
        """
        mass = torch.ones_like(scale) if mass is None else mass
        shape = (len(scale), -1, self.super_block // self.sub_block)
        aim, mass = scale.reshape(shape), mass.reshape(shape)  # (O, B, S / B)
        largest = aim.amax(-1, keepdim=True)
        best = least = None
        for share in TOP_SHARES:
            start = largest / ((share * self.top + self.shift) * self.factor)
            steps = self.nearest_integers(aim, stored_super(start))
            super_scale = self.best_super_scale(aim, steps, mass)
            steps = self.nearest_integers(aim, super_scale)
            error = (super_scale * (steps + self.shift) * self.factor - aim).square() * mass
            error = error.sum(-1, keepdim=True)
            if best is None:
                best, least = (super_scale, steps), error
                continue
            is_better = error < least
            best = tuple(
                torch.where(is_better, new, old)
                for new, old in zip((super_scale, steps), best, strict=True)
            )
            least = torch.minimum(error, least)
        super_scale, steps = best
        return {"super_scale": super_scale.squeeze(-1), "sub_scale": steps.view_as(scale)}

    def with_super_scale(self, parts: Parts, aim: Tensor, mass: Tensor) -> dict[str, Tensor]:
        """Return parts with the super-scales of least error from scales (O, S) given integers."""
        shape = (len(aim), -1, self.super_block // self.sub_block)
        grouped = (t.reshape(shape) for t in (aim, parts["sub_scale"], mass))
        return {**parts, "super_scale": self.best_super_scale(*grouped).squeeze(-1)}

    def nearest_integers(self, aim: Tensor, super_scale: Tensor) -> Tensor:
        """Return the sub-scales nearest to scales under given super-scales."""
        return (aim / (super_scale * self.factor) - self.shift).round().clamp(0, self.top)

    def best_super_scale(self, aim: Tensor, steps: Tensor, mass: Tensor) -> Tensor:
        """Return the least-squares super-scale of sub-scales, as files hold it."""
        units = (steps + self.shift) * self.factor
        along = (mass * units * aim).sum(-1, keepdim=True)
        return stored_super(along / (mass * units.square()).sum(-1, keepdim=True).clamp_min(1e-30))


def stored_super(supers: Tensor) -> Tensor:
    """Return super-scales on the float16 grid, none of them zero, each of the sign it had."""
    return snap_float16(supers.abs().clamp(SUPER_TINY, FLOAT16_MAX).copysign(supers))
