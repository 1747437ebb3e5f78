"""The fit against the full second moment of a layer's inputs, H = mean x x^T.

The error of a layer is E = (W_hat - W) x, so what a fit should lower is tr(E H E^T), in which the
errors of correlated inputs may cancel. Four steps, each vectorized over all rows:

    feed errors   columns in order; what rounding one column costs is made up for by those to come
    descend       columns in order; each weight moves to the best value given all others
    scales        least squares given indices: G x G normal equations per row
    codebook      least squares given indices and scales: C x C normal equations

The last three never raise the error. Where earlier layers are quantized already, all of it aims at
the wanted weight of `qat.quant.drift` in the place of W.

Shape legend: O out, I in, G groups of a row, C codebook values, B columns of a block.

Source: error feedback: GPTQ, Frantar et al. 2022, arXiv:2210.17323. Descent and codebook: LNQ, in
GuidedQuant, Kim et al. 2025, arXiv:2505.07004.
"""

from functools import partial

import torch
from torch import Tensor

from qat.grids.scalar import expand_groups, midpoints, snap_float16, snap_stored
from qat.grids.scales import TensorScale, nearest_stored_scale
from qat.quant.drift import WantedWeight
from qat.quant.fit import away_from_zero, fit_weight
from qat.quant.hessian_blocks import (
    descend_blocks,
    falling_block_order,
    feed_block_errors,
    refit_integers,
)
from qat.quant.normal_equations import (
    change_in_error,
    descend_scales,
    group_products,
    group_sums,
    row_chunks,
    solve_damped,
    with_offsets,
)
from qat.quant.quantized_tensor import QuantizedTensor
from qat.quant.spec import TensorSpec

DAMPING = 0.1  # of the mean diagonal of H; held-out KL falls by a tenth from 0.01 to it
REFITTED_BITS = 3  # codebooks of more values are dense enough as the start has them
START_ROUNDS = 2  # of the fit by second moments: three more change the end by under 0.5%
NUM_SWEEPS = 2  # of scales, codebook and descent after the feedback; two more gain 3%
FINE_BITS = 4  # from which on a plain fit may beat one to the wanted weight
SAMPLED_ROWS = 32  # that such a fit is tried on first
COLUMNS_AT_ONCE = 64  # columns whose effect on later ones is applied as one product
FITTED_ROWS = 32768  # of a fit: bounds its (O, I) temporaries for wide vocabularies


def fit_with_hessian(
    weight: Tensor,
    spec: TensorSpec,
    hessian: Tensor,
    *,
    target: Tensor | WantedWeight | None = None,
    row_weights: Tensor | None = None,
    num_sweeps: int = NUM_SWEEPS,
) -> QuantizedTensor:
    """Return the quantized weight of least error in the layer's output.

    Rows are fitted in chunks, so that a vocabulary of any size fits memory; a learned codebook is
    then fitted to rows spread over all of it.

    Args:
        weight: (O, I), any float dtype.
        spec: The format.
        hessian: mean x_q x_q^T over the inputs that the quantized model feeds, (I, I).
        target: The wanted weight, (O, I), asked for by rows; the weight itself when not given.
        row_weights: As in `fit_weight`.
        num_sweeps: Rounds of scales, codebook and descent.

    Raises:
        ValueError: If a weight or a statistic is not finite, or the format does not fit.
    """
    check_hessian(weight, hessian)

    def wanted(rows: slice) -> Tensor | None:
        return None if target is None else target[rows]

    if len(weight) <= FITTED_ROWS or spec.rank or isinstance(spec.scale, TensorScale):
        return fit_rows(weight, spec, hessian, wanted(slice(None)), row_weights, num_sweeps)
    codebook = None
    if spec.grid.is_learned:
        spread = slice(None, None, -(-len(weight) // FITTED_ROWS))
        sample = None if row_weights is None else row_weights[spread]
        fitted = fit_rows(weight[spread], spec, hessian, wanted(spread), sample, num_sweeps)
        codebook = fitted.codebook
    starts = range(0, len(weight), FITTED_ROWS)
    slices = [slice(start, start + FITTED_ROWS) for start in starts]
    chunks = [
        fit_rows(weight[rows], spec, hessian, wanted(rows), None, num_sweeps, codebook)
        for rows in slices
    ]
    return QuantizedTensor.join(chunks)


def fit_rows(
    weight: Tensor,
    spec: TensorSpec,
    hessian: Tensor,
    target: Tensor | None,
    row_weights: Tensor | None,
    num_sweeps: int,
    codebook: Tensor | None = None,
) -> QuantizedTensor:
    """Return the fit of rows that fit memory together; a given codebook stays as it is."""
    damped = dampen(hessian.to(weight.device))
    is_moved = target is not None
    target = (target if is_moved else weight).detach().to(damped)
    importance = damped.diagonal()
    start = fit_weight(
        target,
        spec,
        importance=importance,
        row_weights=row_weights,
        codebook=codebook,
        num_rounds=START_ROUNDS,
    )
    refits_codebook = spec.grid.is_learned and spec.bits <= REFITTED_BITS and codebook is None
    quantized = feed_errors(target, start, damped)
    if is_moved and is_fine(spec):
        quantized = with_plain_rows(weight, target, quantized, damped)
    for _ in range(num_sweeps):
        if not spec.rank:
            quantized = refit_scale(target, quantized, damped)
        if refits_codebook:
            quantized = refit_codebook(target, quantized, damped)
        quantized = descend(target, quantized, damped)
    return quantized


def is_fine(spec: TensorSpec) -> bool:
    """Return whether a format may hold a weight nearly as it is, row by row.

    Models that were quantized before often lie on such a grid; the wanted weight does not.
    """
    return spec.bits >= FINE_BITS and not spec.rank and not spec.grid.is_learned


def with_plain_rows(
    weight: Tensor, target: Tensor, first: QuantizedTensor, hessian: Tensor
) -> QuantizedTensor:
    """Return a fit with the rows of a plain fit to the weight where those leave less error.

    No row of a sample is better in most models: the others are not fitted then.
    """
    plain = partial(fit_weight, importance=hessian.diagonal(), num_rounds=START_ROUNDS)
    errors = row_errors(target, first, hessian)
    spread = slice(None, None, -(-len(weight) // SAMPLED_ROWS))
    sample = row_errors(target[spread], plain(weight[spread], first.spec), hessian)
    if not (sample < errors[spread]).any():
        return first
    second = plain(weight, first.spec)
    is_better = (row_errors(target, second, hessian) < errors).unsqueeze(1)
    return first.replaced(
        indices=torch.where(is_better, second.indices, first.indices),
        **{
            name: torch.where(is_better, second.parts[name], values)
            for name, values in first.parts.items()
            if name != "codebook"
        },
    )


def row_errors(target: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> Tensor:
    """Return what each row's error costs in the output, (O,)."""
    error = target - quantized.dequantize()
    return ((error @ hessian) * error).sum(1)


def check_hessian(weight: Tensor, hessian: Tensor) -> None:
    """Refuse statistics of another layer, or that are not finite."""
    wanted = (weight.shape[1], weight.shape[1])
    if tuple(hessian.shape) != wanted or not torch.isfinite(hessian).all():
        raise ValueError(
            f"H of shape {tuple(hessian.shape)} must be finite and {wanted} for a "
            f"{tuple(weight.shape)} weight; calibrate on this model, with --dtype fp32"
        )


def dampen(hessian: Tensor) -> Tensor:
    """Return H with a mean diagonal of one and `DAMPING` added to it; ones for an H of zeros."""
    hessian = hessian.float()
    mean = hessian.diagonal().mean()
    identity = torch.eye(len(hessian), device=hessian.device)
    if mean <= 0:  # inputs that are always zero: every weight counts alike
        return identity
    return hessian / mean + DAMPING * identity


def feedback_factor(hessian: Tensor) -> Tensor:
    """Return the upper triangular U with U^T U = H^-1, (I, I).

    With the order of inputs turned round, H = L L^T; turned back, H = R R^T with an upper R, and
    U = R^-1. This never forms H^-1, whose condition float32 does not bear.
    """
    lower = torch.linalg.cholesky(hessian.flip(0, 1))
    identity = torch.eye(len(hessian), device=hessian.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)


def falling_order(hessian: Tensor) -> Tensor:
    """Return the inputs by falling second moment, (I,): the loudest are rounded first."""
    return hessian.diagonal().argsort(descending=True, stable=True)


def feed_errors(target: Tensor, start: QuantizedTensor, hessian: Tensor) -> QuantizedTensor:
    """Return new indices for the scales and codebook of a fit, each column's error fed forward.

    Args:
        target: (O, I), float32.
        start: Gives scales and codebook.
        hessian: Damped, (I, I).
    """
    if start.spec.is_vector:
        order = falling_block_order(hessian, start.spec.grid.block_size)
        return feed_block_errors(target, start, feedback_factor(hessian[order][:, order]), order)
    order = falling_order(hessian)
    factor = feedback_factor(hessian[order][:, order])
    work = target[:, order].T.contiguous()  # (I, O)
    indices = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    rounder = Rounder(start, order)
    pivots = factor.diagonal().tolist()
    for first in range(0, len(work), COLUMNS_AT_ONCE):
        last = min(first + COLUMNS_AT_ONCE, len(work))
        errors = torch.empty(last - first, work.shape[1], device=work.device)  # (B, O)
        for column in range(first, last):
            error = errors[column - first]
            indices[column], value = rounder.round(work[column], column)
            torch.sub(work[column], value, out=error).div_(pivots[column])
            work[column + 1 : last].addr_(factor[column, column + 1 : last], error, alpha=-1)
        work[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    return start.replaced(indices=indices[order.argsort()].T.contiguous())


def descend(target: Tensor, start: QuantizedTensor, hessian: Tensor) -> QuantizedTensor:
    """Return new indices after one pass of coordinate descent: each the best given all others.

    Args:
        target: (O, I), float32.
        start: Gives indices, scales and codebook.
        hessian: Damped, (I, I).
    """
    if start.spec.is_vector:
        order = falling_block_order(hessian, start.spec.grid.block_size)
        return descend_blocks(target, start, hessian[order][:, order], order)
    order = falling_order(hessian)
    hessian = hessian[order][:, order]
    values = start.dequantize()[:, order].T.contiguous()  # (I, O)
    slope = hessian @ (values - target[:, order].T)  # (I, O): half the gradient
    indices = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    rounder = Rounder(start, order)
    steps = hessian.diagonal().reciprocal().tolist()
    for first in range(0, len(values), COLUMNS_AT_ONCE):
        last = min(first + COLUMNS_AT_ONCE, len(values))
        moves = torch.empty(last - first, values.shape[1], device=values.device)  # (B, O)
        for column in range(first, last):
            best = torch.sub(values[column], slope[column], alpha=steps[column])
            indices[column], value = rounder.round(best, column)
            move = torch.sub(value, values[column], out=moves[column - first])
            slope[column + 1 : last].addr_(hessian[column + 1 : last, column], move)
        slope[last:].addmm_(hessian[last:, first:last], moves)
    return start.replaced(indices=indices[order.argsort()].T.contiguous())


class Rounder:
    """Rounds one column of a weight after another to the nearest values of its grid."""

    def __init__(self, quantized: QuantizedTensor, order: Tensor):
        """Take scales and codebook; columns are counted in an order of the inputs, (I,)."""
        num_inputs = len(order)
        scale, offset = quantized.expand()
        self.scale = expand_groups(scale, num_inputs)[:, order].T.contiguous()  # (I, O)
        self.offset = None
        if offset is not None:
            self.offset = expand_groups(offset, num_inputs)[:, order].T.contiguous()
        self.codebook = quantized.codebook  # (C,)
        self.reciprocal = away_from_zero(self.scale).reciprocal()
        self.thresholds = midpoints(self.codebook)

    def round(self, column: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Return indices and values, (O,) each, of the column at a position."""
        if self.offset is not None:
            column = column - self.offset[position]
        normalized = column * self.reciprocal[position]
        index = torch.bucketize(normalized, self.thresholds, out_int32=True)
        value = self.codebook.index_select(0, index) * self.scale[position]
        return index, value if self.offset is None else value.add_(self.offset[position])


def refit_scale(target: Tensor, start: QuantizedTensor, hessian: Tensor) -> QuantizedTensor:
    """Return the least-squares scale (and offset) of every group given the indices, (O, G).

    A row whose stored scales (of the sign allowed) would not lower its error stays.

    Args:
        target: (O, I), float32.
        start: Gives indices and codebook, and the scales of rows that stay.
        hessian: Damped, (I, I).
    """
    spec = start.spec
    if spec.scale.integer_bits:
        return refit_integers(target, start, hessian)
    if isinstance(spec.scale, TensorScale):
        return refit_tensor_scale(target, start, hessian)
    num_groups = start.scale.shape[1]
    values = spec.grid.look_up(start.indices, start.codebook)  # (O, I)
    pulled = target @ hessian
    scale = start.scale.clone()
    offset = start.parts["offset"].clone() if spec.has_offset else None
    num_unknowns = num_groups * (1 if offset is None else 2)
    for rows in row_chunks(len(values), num_unknowns, values.device):
        normal = group_products(values[rows], hessian, num_groups)  # (o, G, G)
        aim = group_sums(pulled[rows] * values[rows], num_groups)  # (o, G)
        previous = scale[rows]
        if offset is not None:
            normal = with_offsets(normal, values[rows], hessian, num_groups)  # (o, 2G, 2G)
            aim = torch.cat([aim, group_sums(pulled[rows], num_groups)], dim=1)
            previous = torch.cat([previous, offset[rows]], dim=1)
        if spec.scale.is_power:
            fitted = descend_scales(normal, aim, previous, spec.scale.stored)
        else:
            solved = solve_damped(normal, aim)
            fitted = stored_solution(solved, previous, num_groups, spec)
        better = change_in_error(normal, aim, fitted, previous) < 0
        chosen = torch.where(better.unsqueeze(1), fitted, previous)
        scale[rows] = chosen[:, :num_groups]
        if offset is not None:
            offset[rows] = chosen[:, num_groups:]
    return start.replaced(scale=scale, **({} if offset is None else {"offset": offset}))


def refit_tensor_scale(target: Tensor, start: QuantizedTensor, hessian: Tensor) -> QuantizedTensor:
    """Return the least-squares scale of all weights together, if it lowers the error as stored."""
    values = start.spec.grid.look_up(start.indices, start.codebook)  # (O, I)
    pulled = values @ hessian
    normal = (pulled * values).sum().view(1, 1, 1)
    aim, former = (pulled * target).sum().view(1, 1), start.scale[:1]
    fitted = nearest_stored_scale(aim / normal[0].clamp_min(1e-30), former, is_signed=False)
    fitted = start.spec.snap_part("scale", fitted)
    is_better = change_in_error(normal, aim, fitted, former) < 0
    return start.replaced(scale=torch.where(is_better, fitted, former).repeat(len(target), 1))


def stored_solution(solved: Tensor, previous: Tensor, num_groups: int, spec: TensorSpec) -> Tensor:
    """Return solved scales, and offsets after them, as the format stores them."""
    scale = nearest_stored_scale(
        solved[:, :num_groups], previous[:, :num_groups], is_signed=spec.is_signed
    )
    stored = snap_stored(scale, spec.stored_dtype)
    if solved.shape[1] == num_groups:
        return stored
    offset = snap_stored(solved[:, num_groups:], spec.stored_dtype)
    return torch.cat(spec.scale.computed(stored, offset), dim=1)


def refit_codebook(target: Tensor, start: QuantizedTensor, hessian: Tensor) -> QuantizedTensor:
    """Return the least-squares codebook given indices and scales; the former one if no better.

    Args:
        target: (O, I), float32.
        start: Gives indices and scales.
        hessian: Damped, (I, I).
    """
    scale = full_scale(start)
    count = len(start.codebook)
    masks = [scale * (start.indices == index) for index in range(count)]  # (O, I) each
    pulled = target @ hessian
    wanted = torch.stack([(mask * pulled).sum() for mask in masks])  # (C,)
    normal = torch.empty(count, count, device=target.device)
    for row, mask in enumerate(masks):
        pulled = mask @ hessian
        for column in range(row, count):
            normal[row, column] = normal[column, row] = (pulled * masks[column]).sum()
    solved = snap_float16(solve_damped(normal.unsqueeze(0), wanted.unsqueeze(0)))[0]
    used = normal.diagonal() > 0
    fitted = torch.where(used & torch.isfinite(solved), solved, start.codebook)
    if not change_in_error(normal, wanted, fitted, start.codebook) < 0:
        return start
    order = fitted.argsort(stable=True)
    indices = order.argsort().to(torch.uint8)[start.indices.int()]
    return start.replaced(indices=indices, codebook=fitted[order])


def full_scale(quantized: QuantizedTensor) -> Tensor:
    """Return one scale per weight, (O, I)."""
    return expand_groups(quantized.full_scale(), quantized.indices.shape[1])


def hessian_error(weight: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> float:
    """Return tr(E H E^T) over tr(W H W^T): 0 is exact, 1 is as bad as all zeros."""
    error = (weight - quantized.dequantize()).double()
    hessian = hessian.double()
    total = (weight.double() @ hessian * weight).sum().clamp_min(1e-30)
    return float((error @ hessian * error).sum() / total)
