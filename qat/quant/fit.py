"""The joint fit of indices, codebook and scales to a weight, by the error it causes in the output.

The error of a layer with input x is (W_hat - W) x, so the squared error of weight (o, i) counts by
the second moment h_i of its input. The three parts are fitted in turn, each in closed form and
each never raising sum h (W - W_hat)^2.

Shape legend: O out, I in, G groups of a row, C codebook values, R rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.grids.codebook import fit_codebook
from qat.grids.scalar import (
    dequantize,
    expand_groups,
    fits_float16,
    fixed_codebook,
    look_up,
    low_rank_scale,
    nearest_indices,
    over_scale,
    snap_float16,
    snap_stored,
)
from qat.grids.scales import (
    LowRank,
    fit_group_scale,
    fit_low_rank,
    search_scale,
    start_low_rank,
    unit_factors,
)
from qat.quant.scheme import LayerScheme

NUM_ROUNDS = 5  # later rounds lower the error by under 0.5% together (2 and 4 bits, group 32)
IMPORTANCE_FLOOR = 1e-4  # of the mean: a channel silent in calibration may speak later


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedWeight:
    """A weight on its grid: indices, codebook and either group scales or low-rank ones."""

    indices: Tensor  # (O, I) uint8
    codebook: Tensor  # (C,) float32 on the float16 grid, ascending
    scale: Tensor | None = None  # (O, G) float32 on the float16 grid
    low_rank: LowRank | None = None

    def full_scale(self) -> Tensor:
        """Return the scales as the grid takes them: (O, G), or (O, I) when low rank."""
        if self.low_rank is None:
            return self.scale
        return low_rank_scale(*self.low_rank)

    def dequantize(self) -> Tensor:
        """Return W_hat, (O, I), float32."""
        return dequantize(self.indices, self.full_scale(), self.codebook)


def fit_weight(
    weight: Tensor,
    scheme: LayerScheme,
    *,
    importance: Tensor | None = None,
    num_rounds: int = NUM_ROUNDS,
) -> QuantizedWeight:
    """Return the quantized weight of least importance-weighted squared error.

    Args:
        weight: (O, I), any float dtype.
        scheme: Bits, group size or rank, codebook.
        importance: Second moment of each input, (I,); all equal when not given.
        num_rounds: Rounds of the three updates.

    Raises:
        ValueError: If a weight is not finite or beyond float16, or the scheme does not fit.
    """
    weight = weight.detach().float()
    check_weight(weight, scheme)
    importance = floored(importance, weight)
    quantized = fit_groups(weight, scheme, importance, num_rounds)
    if scheme.rank:
        quantized = fit_rank(weight, scheme, importance, quantized, num_rounds)
    return quantized


def check_weight(weight: Tensor, scheme: LayerScheme) -> None:
    """Refuse a weight that the scheme cannot hold."""
    if not fits_float16(weight):
        raise ValueError("the weight holds NaN, infinity or values beyond 65504; repair the model")
    if scheme.rank > min(weight.shape):
        raise ValueError(
            f"rank {scheme.rank} exceeds the smaller side of a {tuple(weight.shape)} weight; "
            f"choose at most {min(weight.shape)}"
        )
    if not scheme.rank:
        scheme.groups_of(weight.shape[1])


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
    weight: Tensor, scheme: LayerScheme, importance: Tensor, num_rounds: int
) -> QuantizedWeight:
    """Return the joint fit with one scale per group."""
    num_inputs = weight.shape[1]
    group_size = largest_group(scheme, num_inputs)
    num_groups = num_inputs // group_size
    is_learned = scheme.codebook == "learned"
    even = fixed_codebook("int" if is_learned else scheme.codebook, scheme.bits)
    scale = search_scale(
        weight, importance, even.to(weight.device), num_groups, is_signed=scheme.is_signed
    )
    codebook = start_codebook(weight, scale, importance, scheme)
    for _ in range(num_rounds):
        indices = nearest_indices(over_scale(weight, scale), codebook)
        values = look_up(codebook, indices)
        scale = fit_group_scale(weight, values, importance, scale, is_signed=scheme.is_signed)
        if is_learned:
            codebook = update_codebook(
                weight, indices, expand_groups(scale, num_inputs), importance, codebook
            )
    scale = snap_stored(scale, scheme.stored_dtype)
    indices = nearest_indices(over_scale(weight, scale), codebook)
    return QuantizedWeight(indices=indices, codebook=codebook, scale=scale)


def largest_group(scheme: LayerScheme, num_inputs: int) -> int:
    """Return the group size of a fit; low-rank fits start from groups that divide the row."""
    group_size = scheme.group_size or num_inputs
    if scheme.rank and num_inputs % group_size:
        return num_inputs
    return group_size


def start_codebook(
    weight: Tensor, scale: Tensor, importance: Tensor, scheme: LayerScheme
) -> Tensor:
    """Return the first codebook: fixed, or k-means of weight / scale."""
    if scheme.codebook != "learned":
        return fixed_codebook(scheme.codebook, scheme.bits).to(weight.device)
    full = expand_groups(scale, weight.shape[1])
    return fit_codebook(weight / full, importance * full.square(), scheme.bits)


def update_codebook(
    weight: Tensor, indices: Tensor, scale: Tensor, importance: Tensor, former: Tensor
) -> Tensor:
    """Return each codebook value's least-squares position, given indices and scales.

    Args:
        weight: (O, I).
        indices: (O, I) uint8.
        scale: (O, I).
        importance: (I,).
        former: (C,); a value that no weight uses stays.
    """
    weighted = scale * importance
    flat = indices.flatten().int()
    count = len(former)
    along = torch.bincount(flat, (weighted * weight).flatten(), minlength=count)
    square = torch.bincount(flat, (weighted * scale).flatten(), minlength=count)
    fitted = torch.where(square > 0, along / square.clamp_min(1e-30), former)
    return snap_float16(fitted.float()).sort().values


def fit_rank(
    weight: Tensor,
    scheme: LayerScheme,
    importance: Tensor,
    start: QuantizedWeight,
    num_rounds: int,
) -> QuantizedWeight:
    """Return the joint fit with low-rank scales, started from one with group scales."""
    low_rank = start_low_rank(expand_groups(start.scale, weight.shape[1]), scheme.rank)
    low_rank = unit_factors(low_rank.scale_a * low_rank.magnitude, low_rank.scale_b)
    codebook = start.codebook
    for _ in range(num_rounds):
        full = away_from_zero(low_rank_scale(*low_rank))
        indices = nearest_indices(weight / full, codebook)
        low_rank = fit_low_rank(weight, codebook[indices.int()], importance, low_rank)
        if scheme.codebook == "learned":
            full = low_rank_scale(*low_rank)
            codebook = update_codebook(weight, indices, full, importance, codebook)
    indices = nearest_indices(weight / away_from_zero(low_rank_scale(*low_rank)), codebook)
    return QuantizedWeight(indices=indices, codebook=codebook, low_rank=low_rank)


def away_from_zero(scale: Tensor, least: float = 1e-8) -> Tensor:
    """Return scales whose size is at least `least`, sign kept, so that one may divide by them."""
    return torch.where(scale.abs() < least, torch.full_like(scale, least).copysign(scale), scale)


def weighted_error(weight: Tensor, quantized: QuantizedWeight, importance: Tensor) -> float:
    """Return sum h (W - W_hat)^2 over sum h W^2: 0 is exact, 1 is as bad as all zeros."""
    error = ((weight - quantized.dequantize()).square() * importance).sum()
    return float(error / (weight.square() * importance).sum().clamp_min(1e-30))
