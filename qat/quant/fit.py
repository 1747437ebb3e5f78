"""The joint fit of indices, codebook and scales to a weight, by the error it causes in the output.

The error of a layer with input x is (W_hat - W) x, so the squared error of weight (o, i) counts by
the second moment h_i of its input. The three parts are fitted in turn, each in closed form and
each never raising sum h (W - W_hat)^2.

Shape legend: O out, I in, G groups of a row, C codebook values, R rank.
"""

from itertools import repeat

import torch
from torch import Tensor

from qat.grids.codebook import fit_codebook
from qat.grids.scalar import (
    expand_groups,
    fits_float16,
    look_up,
    low_rank_scale,
    over_scale,
    snap_float16,
    snap_stored,
)
from qat.grids.scales import (
    GroupScale,
    TensorScale,
    fit_group_scale,
    fit_low_rank,
    fit_offset,
    start_low_rank,
    unit_factors,
)
from qat.grids.search import search_affine, search_scale
from qat.quant.fit_blocks import fit_blocks
from qat.quant.fit_integers import fit_integers
from qat.quant.quantized_tensor import QuantizedTensor
from qat.quant.spec import TensorSpec
from qat.runtime.device import numbers_at_once

CODEBOOK_SAMPLE = 2**22  # weights that the first codebook of a larger tensor is learned of
NUM_ROUNDS = 5  # later rounds lower the error by under 0.5% together (2 and 4 bits, group 32)
DEFAULT_GROUP_SIZE = 32  # that a low-rank fit starts from
IMPORTANCE_FLOOR = 1e-4  # of the mean: a channel silent in calibration may speak later


def fit_weight(
    weight: Tensor,
    spec: TensorSpec,
    *,
    importance: Tensor | None = None,
    row_weights: Tensor | None = None,
    codebook: Tensor | None = None,
    num_rounds: int = NUM_ROUNDS,
) -> QuantizedTensor:
    """Return the quantized weight of least importance-weighted squared error.

    Args:
        weight: (O, I), any float dtype.
        spec: The format.
        importance: Second moment of each input, (I,); all equal when not given.
        row_weights: How much each row counts for a learned codebook, (O,), such as the frequency
            of an embedding's tokens; all alike when not given.
        codebook: (C,) ascending, kept as it is in the place of a learned one.
        num_rounds: Rounds of the three updates; half as many of a search over integers.

    Raises:
        ValueError: If a weight is not finite or beyond float16, or the format does not fit.
    """
    weight = weight.detach().float()
    check_weight(weight, spec)
    importance = floored(importance, weight)
    if spec.scale.integer_bits and spec.grid.num_values:
        return fit_integers(weight, spec, importance, -(-num_rounds // 2))
    if spec.scale.integer_bits:
        return fit_blocks(weight, spec, importance, max(1, num_rounds // 2))
    if spec.has_offset:
        return fit_affine(weight, spec, importance, num_rounds)
    if isinstance(spec.scale, TensorScale):
        return fit_tensor(weight, spec, importance, num_rounds)
    rows = None if row_weights is None else row_weights.to(weight.device).float().unsqueeze(1)
    group_spec = start_spec(spec, weight.shape[1]) if spec.rank else spec
    start = fit_groups(weight, group_spec, importance, num_rounds, spec.is_signed, rows, codebook)
    if not spec.rank:
        return start
    return fit_rank(weight, spec, importance, start, num_rounds, is_fixed=codebook is not None)


def check_weight(weight: Tensor, spec: TensorSpec) -> None:
    """Refuse a weight that a format cannot hold."""
    if not fits_float16(weight):
        raise ValueError("the weight holds NaN, infinity or values beyond 65504; repair the model")
    spec.check(tuple(weight.shape))


def start_spec(spec: TensorSpec, num_inputs: int) -> TensorSpec:
    """Return the group format that a low-rank fit starts from: groups that divide the row."""
    group_size = DEFAULT_GROUP_SIZE if num_inputs % DEFAULT_GROUP_SIZE == 0 else 0
    return spec.with_scale(GroupScale(group_size))


def floored(importance: Tensor | None, weight: Tensor) -> Tensor:
    """Return importances with mean one and none near zero, (I,), float32."""
    if importance is None:
        return torch.ones(weight.shape[1], device=weight.device)
    importance = importance.to(weight.device, torch.float32)
    if importance.shape != weight.shape[1:] or not torch.isfinite(importance).all():
        raise ValueError(
            f"importance of shape {tuple(importance.shape)} must be finite, one per input of a "
            f"{tuple(weight.shape)} weight; calibrate on this model"
        )
    mean = importance.mean().clamp_min(1e-30)
    return (importance / mean).clamp_min(IMPORTANCE_FLOOR)


def fit_groups(
    weight: Tensor,
    spec: TensorSpec,
    importance: Tensor,
    num_rounds: int,
    is_signed: bool,
    rows: Tensor | None = None,
    codebook: Tensor | None = None,
) -> QuantizedTensor:
    """Return the joint fit with one scale per group, of either sign where `is_signed`.

    Row weights (O, 1) count for a learned codebook, which is fitted unless one is given.
    """
    grid = spec.grid
    is_learned = grid.is_learned and codebook is None
    mass = importance if rows is None else importance * rows
    form = spec.scale
    scale = search_scale(weight, importance, grid.start, form, is_signed=is_signed)
    if is_learned:
        codebook = learned_codebook(weight, scale, mass, grid.bits)
    elif codebook is None:
        codebook = grid.start_codebook().to(weight.device)
    step = max(1, numbers_at_once(weight.device) // weight.shape[1])  # rows that fit in a cache
    masses = repeat(mass) if mass.dim() == 1 else mass.split(step)

    def rounded(part: Tensor, scale: Tensor) -> Tensor:
        return grid.round(over_scale(part, scale), codebook)

    def refit(part: Tensor, former: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        indices = rounded(part, former)
        values = look_up(codebook, indices)
        scale = fit_group_scale(part, values, importance, former, is_signed=is_signed, form=form)
        full = expand_groups(scale, part.shape[1])
        count = len(codebook) if is_learned else 0
        return scale, codebook_sums(part, indices, full, mass, count)

    for _ in range(num_rounds):
        parts = zip(weight.split(step), scale.split(step), masses, strict=False)
        scales, sums = zip(*[refit(*part) for part in parts], strict=True)
        scale = torch.cat(scales)
        if is_learned:
            codebook = codebook_of(sum(sums), codebook)
    scale = spec.snap_part("scale", scale)
    indices = [rounded(*part) for part in zip(weight.split(step), scale.split(step), strict=True)]
    return QuantizedTensor(spec, torch.cat(indices), {"scale": scale, "codebook": codebook})


def fit_tensor(
    weight: Tensor, spec: TensorSpec, importance: Tensor, num_rounds: int
) -> QuantizedTensor:
    """Return the fit with one scale for all weights: that of a single long row."""
    mass, row_spec = importance.repeat(len(weight)), spec.with_scale(GroupScale(0))
    row = fit_groups(weight.reshape(1, -1), row_spec, mass, num_rounds, spec.is_signed)
    parts = {**row.parts, "scale": row.scale.repeat(len(weight), 1)}
    return QuantizedTensor(spec, row.indices.view_as(weight), parts)


def learned_codebook(weight: Tensor, scale: Tensor, importance: Tensor, bits: int) -> Tensor:
    """Return the first codebook of a fit: k-means of weight / scale, of rows spread over many."""
    spread = slice(None, None, 1 + weight.numel() // CODEBOOK_SAMPLE)
    weight, scale = weight[spread], scale[spread]
    importance = importance if importance.dim() == 1 else importance[spread]
    full = expand_groups(scale, weight.shape[1])
    return fit_codebook(weight / full, importance * full.square(), bits)


def fit_affine(
    weight: Tensor, spec: TensorSpec, importance: Tensor, num_rounds: int
) -> QuantizedTensor:
    """Return the joint fit with a scale and an offset per group.

    Source: alternating least squares over both, as in HQQ and ggml's make_qkx2_quants; here each
    step is closed form and weighted by the inputs' second moments.
    """
    grid = spec.grid
    codebook = grid.start_codebook().to(weight.device)
    num_groups = spec.scale.groups_of(weight.shape[1])
    scale, offset = search_affine(weight, importance, grid, num_groups)
    for _ in range(num_rounds):
        values = grid.nearest(over_scale(weight, scale, offset), codebook)
        scale, offset = fit_offset(weight, values, importance, (scale, offset))
    scale, offset = (snap_stored(part, spec.stored_dtype) for part in (scale, offset))
    scale, offset = spec.scale.computed(scale, offset)
    indices = grid.round(over_scale(weight, scale, offset), codebook)
    return QuantizedTensor(spec, indices, {"scale": scale, "offset": offset, "codebook": codebook})


def update_codebook(
    weight: Tensor, indices: Tensor, scale: Tensor, importance: Tensor, previous: Tensor
) -> Tensor:
    """Return each codebook value's least-squares position, given indices and scales.

    Args:
        weight: (O, I).
        indices: (O, I) uint8.
        scale: (O, I).
        importance: (I,) or (O, I).
        previous: (C,); a value that no weight uses stays.
    """
    return codebook_of(codebook_sums(weight, indices, scale, importance, len(previous)), previous)


def codebook_sums(
    weight: Tensor, indices: Tensor, scale: Tensor, importance: Tensor, count: int
) -> Tensor:
    """Return what a codebook's least squares take of some rows, (2, C); nothing for C = 0."""
    if not count:
        return weight.new_empty(2, 0)
    weighted, flat = scale * importance, indices.flatten().int()
    along = torch.bincount(flat, (weighted * weight).flatten(), minlength=count)
    square = torch.bincount(flat, (weighted * scale).flatten(), minlength=count)
    return torch.stack([along, square])


def codebook_of(sums: Tensor, previous: Tensor) -> Tensor:
    """Return the codebook of least squares; a value that no weight uses stays."""
    along, square = sums
    fitted = torch.where(square > 0, along / square.clamp_min(1e-30), previous)
    return snap_float16(fitted.float()).sort().values


def fit_rank(
    weight: Tensor,
    spec: TensorSpec,
    importance: Tensor,
    start: QuantizedTensor,
    num_rounds: int,
    *,
    is_fixed: bool = False,
) -> QuantizedTensor:
    """Return the joint fit with low-rank scales, started from one with group scales."""
    low_rank = start_low_rank(expand_groups(start.scale, weight.shape[1]), spec.rank)
    low_rank = unit_factors(low_rank.scale_a * low_rank.magnitude, low_rank.scale_b)
    codebook = start.codebook
    for _ in range(num_rounds):
        full = away_from_zero(low_rank_scale(*low_rank))
        indices = spec.grid.round(weight / full, codebook)
        low_rank = fit_low_rank(weight, codebook[indices.int()], importance, low_rank)
        if spec.grid.is_learned and not is_fixed:
            full = low_rank_scale(*low_rank)
            codebook = update_codebook(weight, indices, full, importance, codebook)
    indices = spec.grid.round(weight / away_from_zero(low_rank_scale(*low_rank)), codebook)
    return QuantizedTensor(spec, indices, {**low_rank._asdict(), "codebook": codebook})


def away_from_zero(scale: Tensor, least: float = 1e-8) -> Tensor:
    """Return scales whose size is at least `least`, sign kept, so that one may divide by them."""
    return torch.where(scale.abs() < least, torch.full_like(scale, least).copysign(scale), scale)


def weighted_error(weight: Tensor, quantized: QuantizedTensor, importance: Tensor) -> float:
    """Return sum h (W - W_hat)^2 over sum h W^2: 0 is exact, 1 is as bad as all zeros."""
    error = ((weight - quantized.dequantize()).square() * importance).sum()
    return float(error / (weight.square() * importance).sum().clamp_min(1e-30))
