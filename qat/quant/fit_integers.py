"""The fit of scalar grids with super-block scales: integers are tried one by one, errors exact.

Each sub-block first gets the best of several real scales (and offsets). For several places of the
largest integer, super-scales follow; then many integers around the first ones are tried for each
sub-block with the grid values that suit them, and super-scales are solved given both. Which weights
happen to lie near grid values decides more than how wide a sub-block is, so trying many pays.

Sub-blocks are columns here: sums over their weights then run along contiguous rows. Parts have a
row for each super-block.

Shape legend: O out, I in, E weights of a sub-block, N sub-blocks, M super-blocks, S sub-blocks of a
super-block.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qat.grids.scalar import midpoints, over_scale
from qat.grids.super_blocks import stored_super
from qat.quant.normal_equations import solve_damped
from qat.quant.quantized_tensor import QuantizedTensor
from qat.quant.spec import TensorSpec
from qat.runtime.device import numbers_at_once

REACHES = (0.7, 0.8, 0.9, 1.0)  # of the grid's outer value, as shares of the largest weight
CLIPS = (0.0, 0.05, 0.1, 0.2, 0.3)  # of a sub-block's range, cut off at either end
TOPS = (0.94, 0.8, 0.87)  # places of the largest integer, as shares of its range
WINDOW = 8  # the first round tries integers as far away as an eighth of their range
NUDGES = 3  # offsets around the one that keeps the mean where it was
NEAR = 3  # later rounds

Parts = dict[str, Tensor]


def fit_integers(
    weight: Tensor, spec: TensorSpec, importance: Tensor, num_starts: int = len(TOPS)
) -> QuantizedTensor:
    """Return the quantized weight of least importance-weighted squared error.

    Args:
        weight: (O, I), float32.
        spec: A scalar grid of fixed integers with super-block scales.
        importance: (I,), positive.
        num_starts: Of `TOPS`, how many to try; one, of a fit that others improve, also tries
            near integers only.
    """
    step = max(1, numbers_at_once(weight.device) // weight.shape[1])
    chunks = [Search(rows, spec, importance).fit(num_starts) for rows in weight.split(step)]
    parts = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    codebook = spec.grid.start_codebook().to(weight.device)
    scales = spec.scale.expand(parts, lambda values: values)
    indices = spec.grid.round(over_scale(weight, *scales), codebook)
    return QuantizedTensor(spec, indices, {**parts, "codebook": codebook})


class Search:
    """The sub-blocks of some rows, and the errors that scales leave in them."""

    def __init__(self, weight: Tensor, spec: TensorSpec, importance: Tensor):
        self.form, self.num_rows = spec.scale, len(weight)
        size = self.form.sub_block
        self.weight = weight.reshape(-1, size).T.contiguous()  # (E, N)
        self.mass = importance.expand_as(weight).reshape(-1, size).T.contiguous()
        codebook = spec.grid.start_codebook().to(weight.device)
        self.low, self.high = float(codebook[0]), float(codebook[-1])
        self.table = None
        if spec.grid.kind == "iq4_nl":  # uneven integers: their thresholds are halves
            halves = torch.arange(2 * self.low, 2 * self.high + 1, device=weight.device) / 2
            self.table = codebook[torch.bucketize(halves, midpoints(codebook), right=True)]

    def fit(self, num_starts: int) -> Parts:
        """Return the best parts found, a row for each row of the weight."""
        aim = torch.cat([part.view(-1, self.form.per_super) for part in self.start()], dim=1)
        far = (self.form.top + 1) // WINDOW
        near = min(NEAR, far)
        reaches = (near,) if num_starts == 1 else (far, near)
        best, least = self.refined(self.placed(aim, TOPS[0]), reaches)
        for top in TOPS[1:num_starts]:
            found, errors = self.refined(self.placed(aim, top), reaches)
            best, least = better(best, least, found, errors)
        return {name: part.view(self.num_rows, -1) for name, part in best.items()}

    def values(self, scale: Tensor, offset: Tensor | None) -> Tensor:
        """Return the grid values nearest to the weights, (E, N), of scales and offsets (N,)."""
        shifted = self.weight if offset is None else self.weight - offset
        inverse = scale.reciprocal().masked_fill_(scale == 0, 0.0)
        if self.table is None:
            return (shifted * inverse).round_().clamp_(self.low, self.high)
        halves = (shifted * (2 * inverse)).floor_().clamp_(2 * self.low, 2 * self.high)
        cells = halves.sub_(2 * self.low).int().view(-1)
        return self.table.index_select(0, cells).view_as(halves)

    def errors(self, parts: Parts) -> Tensor:
        """Return the error that parts leave in each sub-block, (M, S)."""
        scale, offset = self.expand(parts)
        found = self.values(scale, offset).mul_(scale)
        if offset is not None:
            found.add_(offset)
        return found.sub_(self.weight).square_().mul_(self.mass).sum(0).view_as(parts["sub_scale"])

    def expand(self, parts: Parts) -> tuple[Tensor, Tensor | None]:
        """Return scales and offsets, (N,) each."""
        scale, offset = self.form.expand(parts, lambda values: values)
        return scale.flatten(), None if offset is None else offset.flatten()

    def start(self) -> tuple[Tensor, ...]:
        """Return the best of several real scales, (N,), and offsets where the format has them."""
        best = least = None
        for scale, offset in self.start_candidates():
            found, errors = self.solved(self.values(scale, offset))
            found = dict(enumerate(found))
            best, least = better(best or found, errors if best is None else least, found, errors)
        return tuple(best.values())

    def start_candidates(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield scales, and offsets where the format has them, (N,) each."""
        if not self.form.has_offset:
            largest = self.weight.abs().amax(0) / max(-self.low, self.high)
            for reach in REACHES:
                yield from ((largest * reach, None), (largest * -reach, None))
            return
        low, high = self.weight.amin(0).clamp_max(0), self.weight.amax(0)
        for below in CLIPS:
            for above in CLIPS:
                range_ = (high - low) * (1 - below - above)
                yield range_ / self.high, low + below * (high - low)

    def solved(self, values: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the least-squares scale (and offset) of grid values, and the error, (N,) each."""
        weighted = values * self.mass
        along, square = (weighted * self.weight).sum(0), (weighted * values).sum(0)
        scale = along / square.clamp_min(1e-30)
        if not self.form.has_offset:
            return (scale,), -scale * along  # less what zeros leave
        total, mean = self.mass.sum(0), (self.mass * self.weight).sum(0)
        sums = weighted.sum(0)
        spread = (square - sums * sums / total).clamp_min(1e-30)
        slope = ((along - sums * mean / total) / spread).clamp_min(0)
        offset = (mean - slope * sums) / total
        scale = torch.where(offset > 0, scale.clamp_min(0), slope)
        offset = offset.clamp_max(0)
        errors = (values * scale).add_(offset).sub_(self.weight).square_().mul_(self.mass).sum(0)
        return (scale, offset), errors

    def placed(self, aim: Tensor, top: float) -> Parts:
        """Return parts near to scales and offsets, joined, by the place of the largest."""
        parts = {}
        chunks = aim.chunk(len(self.form.pairs), dim=1)
        for (upper, lower), wanted in zip(self.form.pairs, chunks, strict=True):
            largest = wanted.abs().amax(1, keepdim=True)
            parts[upper] = stored_super(largest / (top * self.form.reach(lower)))
            parts[lower] = self.form.nearest_integers(wanted, parts[upper], lower)
        return parts

    def refined(self, parts: Parts, reaches: Sequence[int]) -> tuple[Parts, Tensor]:
        """Return parts after rounds of integers and super-scales, and their errors, (M, 1)."""
        for reach in reaches:
            parts, errors = self.search(parts, reach)
            solved = self.with_solved_supers(parts)
            errors = [each.sum(1, keepdim=True) for each in (errors, self.errors(solved))]
            parts, errors = better(parts, errors[0], solved, errors[1])
        return parts, errors

    def search(self, parts: Parts, reach: int) -> tuple[Parts, Tensor]:
        """Return parts with the best of integers around theirs, and their errors, (M, S)."""
        best, least = parts, self.errors(parts)
        for candidate in self.candidates(parts, reach):
            errors = self.errors({**parts, **candidate})
            best, least = better(best, least, candidate, errors)
        return best, least

    def candidates(self, parts: Parts, reach: int) -> Iterator[Parts]:
        """Yield other integers for parts; scales of either sign are mirrored as well."""
        form, middle = self.form, parts["sub_scale"]
        steps = range(-reach, reach + 1)
        if not form.has_offset:
            for start in (middle, -2 * form.shift - middle):
                for step in steps:
                    yield {"sub_scale": (start + step).clamp_(0, form.top)}
            return
        weighted = self.values(*self.expand(parts)).mul_(self.mass).sum(0) / self.mass.sum(0)
        drift = weighted.view_as(middle) * parts["super_scale"] / parts["super_offset"]
        for step in steps:
            scales = (middle + step).clamp_(0, form.top)
            kept = (parts["sub_offset"] + drift * (scales - middle)).round_()
            for nudge in range(-min(NUDGES, reach), min(NUDGES, reach) + 1):
                offsets = (kept + nudge).clamp_(0, form.top)
                yield {"sub_scale": scales, "sub_offset": offsets}

    def with_solved_supers(self, parts: Parts) -> Parts:
        """Return parts with the least-squares super-scales of integers and their grid values."""
        values = self.values(*self.expand(parts))
        shape = (self.form.sub_block, *parts["sub_scale"].shape)
        units = [self.form.units(parts[lower], lower) for _, lower in self.form.pairs]  # (M, S)
        w, mass = self.weight.view(shape), self.mass.view(shape)
        basis = [values.view(shape) * units[0], *(unit.expand(shape) for unit in units[1:])]
        normal = torch.stack([(a * b * mass).sum((0, 2)) for a in basis for b in basis], dim=-1)
        wanted = torch.stack([(a * w * mass).sum((0, 2)) for a in basis], dim=-1)
        solved = solve_damped(normal.unflatten(-1, (len(basis), -1)), wanted)  # (M, 1 or 2)
        supers = {}
        for k, (upper, _) in enumerate(self.form.pairs):
            found = solved[:, k : k + 1]
            is_allowed = torch.isfinite(found) & ((found > 0) | self.form.is_signed)
            supers[upper] = stored_super(found.where(is_allowed, parts[upper]))
        return parts | supers


def better(best: Parts, least: Tensor, found: Parts, errors: Tensor) -> tuple[Parts, Tensor]:
    """Return the parts that were found where their errors are less, the best ones elsewhere."""
    is_better = errors < least
    chosen = {name: torch.where(is_better, part, best[name]) for name, part in found.items()}
    return {**best, **chosen}, torch.minimum(errors, least)
