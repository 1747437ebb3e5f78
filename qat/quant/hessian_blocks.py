"""Error feedback and descent against H in blocks of columns that are rounded together.

With U of U^T U = H^-1, rounding block b leaves the error E = (W_b - Q_b) U_bb^-1 that later columns
make up for by -E U[b, later]; what they cannot make up for is |E|^2, so M = U_bb^-1 U_bb^-T is the
metric of the block, and its diagonal the importance of its weights in the rounding. Descent moves
each block to the best given all others, and keeps it where that would not lower the error.

Shape legend: O out, I in, S sub-blocks of a row (2S where offsets are joined to scales), D weights
of a block, B columns at once.
"""

import torch
from torch import Tensor

from qat.grids.scales import Parts
from qat.grids.super_blocks import SuperBlockScale, stored_super
from qat.quant.normal_equations import (
    change_in_error,
    group_products,
    group_sums,
    row_chunks,
    solve_damped,
    with_offsets,
)
from qat.quant.quantized_tensor import QuantizedTensor

BLOCKS_AT_ONCE = 8  # whose effect on later columns is applied as one product


def falling_block_order(hessian: Tensor, size: int) -> Tensor:
    """Return the inputs, blocks by falling sum of second moments, (I,)."""
    blocks = hessian.diagonal().view(-1, size)
    order = blocks.sum(1).argsort(descending=True, stable=True)
    places = torch.arange(size, device=hessian.device)
    return (order.unsqueeze(1) * size + places).view(-1)


class BlockRounder:
    """Rounds one block of columns after another with the scales of a fit."""

    def __init__(self, quantized: QuantizedTensor, order: Tensor):
        """Take scales; blocks are counted in an order of the inputs, (I,)."""
        self.grid = quantized.spec.grid
        self.size = self.grid.block_size
        self.order = order[:: self.size] // self.size  # of blocks
        scale = quantized.full_scale()
        per_scale = len(order) // self.size // scale.shape[1]
        self.scale = scale.repeat_interleave(per_scale, dim=1)[:, self.order]  # (O, I / D)
        self.indices = torch.empty_like(quantized.indices)

    def round(self, wanted: Tensor, block: int, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices (O,) and values (O, D) of a block of weights (O, D)."""
        scale = self.scale[:, block : block + 1]
        indices = self.grid.round(wanted / scale, None, importance)
        return indices.squeeze(1), self.grid.look_up(indices) * scale

    def keep(self, block: int, indices: Tensor) -> None:
        """Note the indices of a block, (O,)."""
        self.indices[:, self.order[block]] = indices


def feed_block_errors(
    target: Tensor, start: QuantizedTensor, factor: Tensor, order: Tensor
) -> QuantizedTensor:
    """Return new indices for the scales of a fit, each block's error fed forward.

    Args:
        target: (O, I), float32.
        start: Gives scales.
        factor: U of the damped H in the order of inputs, (I, I).
        order: Of inputs, blocks together, (I,).
    """
    rounder = BlockRounder(start, order)
    size, work = rounder.size, target[:, order]
    num_inputs, step = work.shape[1], BLOCKS_AT_ONCE * rounder.size
    identity = torch.eye(size, device=work.device)
    for first in range(0, num_inputs, step):
        last = min(first + step, num_inputs)
        errors = torch.empty(len(work), last - first, device=work.device)  # (O, B)
        for left in range(first, last, size):
            block = slice(left, left + size)
            inverse = torch.linalg.solve_triangular(factor[block, block], identity, upper=True)
            indices, values = rounder.round(work[:, block], left // size, inverse.square().sum(1))
            rounder.keep(left // size, indices)
            error = (work[:, block] - values) @ inverse
            errors[:, left - first : left - first + size] = error
            work[:, left + size : last] -= error @ factor[block, left + size : last]
        work[:, last:].addmm_(errors, factor[first:last, last:], alpha=-1)
    return start.replaced(indices=rounder.indices)


def descend_blocks(
    target: Tensor, start: QuantizedTensor, hessian: Tensor, order: Tensor
) -> QuantizedTensor:
    """Return new indices after one pass of descent: each block the best given all others.

    Args:
        target: (O, I), float32.
        start: Gives indices and scales.
        hessian: Damped, in the order of inputs, (I, I).
        order: Of inputs, blocks together, (I,).
    """
    rounder = BlockRounder(start, order)
    size, values = rounder.size, start.dequantize()[:, order]
    indices = start.indices[:, rounder.order]
    slope = (values - target[:, order]) @ hessian  # (O, I): half the gradient
    num_inputs, step = values.shape[1], BLOCKS_AT_ONCE * size
    for first in range(0, num_inputs, step):
        last = min(first + step, num_inputs)
        moves = torch.empty(len(values), last - first, device=values.device)  # (O, B)
        for left in range(first, last, size):
            block = slice(left, left + size)
            metric, pull = hessian[block, block], slope[:, block]
            best = values[:, block] - torch.linalg.solve(metric, pull, left=False)
            found, rounded = rounder.round(best, left // size, metric.diagonal())
            move = rounded - values[:, block]
            gain = ((move @ metric + 2 * pull) * move).sum(1)  # of the error, negative if better
            is_better = gain < 0
            rounder.keep(left // size, found.where(is_better, indices[:, left // size]))
            move = move * is_better.unsqueeze(1)
            moves[:, left - first : left - first + size] = move
            slope[:, left + size : last] += move @ hessian[block, left + size : last]
        slope[:, last:].addmm_(moves, hessian[first:last, last:])
    return start.replaced(indices=rounder.indices)


def refit_integers(target: Tensor, start: QuantizedTensor, hessian: Tensor) -> QuantizedTensor:
    """Return super-scales and integers of less error, given the indices.

    The least-squares scales (and offsets) are snapped to what the format holds, and taken by rows
    that they serve better; then each integer in turn is the best given all others, then
    super-scales are solved.

    Args:
        target: (O, I), float32.
        start: Gives indices, and the scales of rows that stay.
        hessian: Damped, (I, I).
    """
    form = start.spec.scale
    values = start.spec.grid.look_up(start.indices, start.codebook)  # (O, I)
    pulled = target @ hessian
    num_groups = start.parts["sub_scale"].shape[1]
    chunks = []
    num_unknowns = num_groups * len(form.pairs)
    for rows in row_chunks(len(values), num_unknowns, values.device):
        normal = group_products(values[rows], hessian, num_groups)  # (o, S, S)
        aim = group_sums(pulled[rows] * values[rows], num_groups)  # (o, S)
        if form.has_offset:  # joined with the offsets': (o, 2S, 2S) and (o, 2S)
            normal = with_offsets(normal, values[rows], hessian, num_groups)
            aim = torch.cat([aim, group_sums(pulled[rows], num_groups)], dim=1)
        parts = {name: start.parts[name][rows] for pair in form.pairs for name in pair}
        solved, previous = solve_damped(normal, aim), form.joined(parts)
        is_allowed = torch.isfinite(solved)
        if not form.is_signed:
            is_allowed &= (solved > 0) | (previous <= 0)  # offsets are below zero
        solved = torch.where(is_allowed, solved, previous)
        mass = normal.diagonal(dim1=1, dim2=2)
        parts = better_rows(form, normal, aim, parts, form.from_effective(solved, mass))
        parts = descend_integers(form, normal, aim, parts)
        chunks.append(better_rows(form, normal, aim, parts, solve_super(form, normal, aim, parts)))
    return start.replaced(**{name: torch.cat([c[name] for c in chunks]) for name in chunks[0]})


def better_rows(
    form: SuperBlockScale, normal: Tensor, aim: Tensor, previous: Parts, fitted: Parts
) -> dict[str, Tensor]:
    """Return fitted parts in the rows whose error they lower, previous ones in the others."""
    change = change_in_error(normal, aim, form.joined(fitted), form.joined(previous))
    is_better = (change < 0).unsqueeze(1)
    return {name: torch.where(is_better, fitted[name], previous[name]) for name in previous}


def descend_integers(
    form: SuperBlockScale, normal: Tensor, aim: Tensor, parts: Parts
) -> dict[str, Tensor]:
    """Return parts after one pass over the integers, each the best given all others."""
    supers, integers = form.join(parts)
    full, integers, scale = form.full(supers), integers.clone(), form.joined(parts)  # (o, S or 2S)
    slope = torch.einsum("osk,ok->os", normal, scale) - aim
    num_groups = parts["sub_scale"].shape[1]
    for place in range(integers.shape[1]):
        name, at = form.pairs[place // num_groups][1], slice(place, place + 1)
        square = normal[:, place, at].clamp_min(1e-30)
        best = scale[:, at] - slope[:, at] / square
        integers[:, at] = form.nearest_integers(best, full[:, at], name)
        fitted = full[:, at] * form.units(integers[:, at], name)
        slope += normal[:, place] * (fitted - scale[:, at])
    return form.split(supers, integers)


def solve_super(
    form: SuperBlockScale, normal: Tensor, aim: Tensor, parts: Parts
) -> dict[str, Tensor]:
    """Return parts with the least-squares super-scales of their integers."""
    supers, integers = form.join(parts)
    units = form.joined_units(integers)  # (o, S or 2S)
    num_super = supers.shape[1]
    weighted = normal * units.unsqueeze(1) * units.unsqueeze(2)
    blocks = weighted.view(len(units), num_super, -1, num_super, units.shape[1] // num_super)
    wanted = (aim * units).view(*supers.shape, -1).sum(-1)
    solved = solve_damped(blocks.sum((2, 4)), wanted)
    is_allowed = torch.isfinite(solved) & ((solved > 0) | form.is_signed)
    return form.split(stored_super(solved.where(is_allowed, supers)), integers)
