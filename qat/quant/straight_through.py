"""Fake quantization with straight-through gradients, saving nothing but its inputs.

Forward: v = latent / S, W_hat = S * C[nearest(v)]. Backward, from dW = dL/dW_hat:

    dlatent = dW                      where v lies on the codebook's range, else 0
    dS      = dW * (C[indices] - v)   on the range (rounding is taken as identity), dW * C outside
    dC[j]   = sum of dW * S over the weights whose index is j

With frozen indices there is no latent weight and dS = dW * C[indices].

Shape legend: O out, I in, G scales of a row (I where every weight has its own), C codebook values.

Source: Bengio et al. 2013, arXiv:1308.3432 (straight-through); the scale's gradient is that of
LSQ, Esser et al. 2020, arXiv:1902.08153, equation 3.
"""

import torch
from torch import Tensor

from qat.grids.scalar import (
    dequantize,
    look_up,
    nearest_values,
    over_scale,
    snap_bfloat16,
    snap_float16,
    thresholds_below,
    times_scale,
)
from qat.runtime.device import numbers_at_once


class SnapFloat16(torch.autograd.Function):
    """Float16 rounding whose gradient is the identity."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        """Return the nearest float16 numbers in the input's dtype."""
        return snap_float16(values)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        """Return the gradient unchanged."""
        return gradient


class SnapBfloat16(torch.autograd.Function):
    """Rounding to numbers of both 16-bit dtypes, whose gradient is the identity."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        """Return near numbers of both dtypes in the input's dtype."""
        return snap_bfloat16(values)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        """Return the gradient unchanged."""
        return gradient


class FakeQuantize(torch.autograd.Function):
    """Nearest codebook value times scale, straight through to the latent weight."""

    @staticmethod
    def forward(ctx, latent: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
        """Return W_hat, (O, I), from a latent weight (O, I), scales (O, G), a codebook (C,)."""
        ctx.save_for_backward(latent, scale, codebook)
        quantized = torch.empty_like(latent, dtype=dtype)
        for rows in row_chunks(latent):
            values = nearest_values(over_scale(latent[rows], scale[rows]), codebook)
            quantized[rows] = times_scale(values, scale[rows])
        return quantized

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of latent weight, scale and codebook."""
        wanted = ctx.needs_input_grad[:3]
        return *fake_quantize_gradients(*ctx.saved_tensors, gradient, *wanted), None


class Dequantize(torch.autograd.Function):
    """Frozen indices times scale, with gradients to scale and codebook."""

    @staticmethod
    def forward(
        ctx, indices: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Return W_hat, (O, I), from indices (O, I), scales (O, G), a codebook (C,)."""
        ctx.save_for_backward(indices, scale, codebook)
        quantized = torch.empty_like(indices, dtype=dtype)
        for rows in row_chunks(indices):
            quantized[rows] = dequantize(indices[rows], scale[rows], codebook)
        return quantized

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of scale and codebook."""
        wanted = ctx.needs_input_grad[1:3]
        return None, *dequantize_gradients(*ctx.saved_tensors, gradient, *wanted), None


def fake_quantize(
    latent: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the quantized weight that a latent weight stands for, straight through.

    Args:
        latent: (O, I), float32.
        scale: (O, G), one per group of I / G weights; G = I for one per weight.
        codebook: (C,), any order: it is sorted here, so that training may move its values.
        dtype: Of the result; the product is rounded to it once.
    """
    return FakeQuantize.apply(latent, scale, codebook.sort().values, dtype)


def fake_quantize_gradients(
    latent: Tensor,
    scale: Tensor,
    codebook: Tensor,
    gradient: Tensor,
    wants_latent: bool,
    wants_scale: bool,
    wants_codebook: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of latent weight, scale and codebook; None where not wanted.

    Args:
        latent: (O, I), float32.
        scale: (O, G).
        codebook: (C,), ascending.
        gradient: dL/dW_hat, (O, I), any float dtype.
        wants_latent: Whether the first gradient is asked for.
        wants_scale: Whether the second is.
        wants_codebook: Whether the third is.
    """
    low, high = codebook_range(codebook)
    d_latent = torch.empty_like(latent) if wants_latent else None
    d_scale = torch.empty_like(scale) if wants_scale else None
    d_codebook = torch.zeros_like(codebook) if wants_codebook else None
    for rows in row_chunks(latent):
        arriving = gradient[rows].float()
        # A scale of zero makes NaN or infinity of a weight, which no product may meet.
        normalized = over_scale(latent[rows], scale[rows]).nan_to_num_()
        on_range = normalized.maximum(low).minimum(high)
        inside = torch.eq(normalized, on_range, out=torch.empty_like(normalized))  # 0.0 or 1.0
        if wants_latent:
            torch.mul(arriving, inside, out=d_latent[rows])
        if wants_scale:
            slope = nearest_values(normalized, codebook).addcmul_(on_range, inside, value=-1)
            d_scale[rows] = sum_groups(slope.mul_(arriving), scale.shape[1])
        if wants_codebook:
            indices = thresholds_below(normalized, codebook)
            d_codebook += codebook_gradient(arriving, indices, scale[rows], len(codebook))
    return d_latent, d_scale, d_codebook


def dequantize_gradients(
    indices: Tensor,
    scale: Tensor,
    codebook: Tensor,
    gradient: Tensor,
    wants_scale: bool,
    wants_codebook: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of scale and codebook for frozen indices; None where not wanted.

    Args:
        indices: (O, I), integers.
        scale: (O, G).
        codebook: (C,).
        gradient: dL/dW_hat, (O, I), any float dtype.
        wants_scale: Whether the first gradient is asked for.
        wants_codebook: Whether the second is.
    """
    d_scale = torch.empty_like(scale) if wants_scale else None
    d_codebook = torch.zeros_like(codebook) if wants_codebook else None
    for rows in row_chunks(gradient):
        arriving = gradient[rows].float()
        if wants_scale:
            values = look_up(codebook, indices[rows])
            d_scale[rows] = sum_groups(values.mul_(arriving), scale.shape[1])
        if wants_codebook:
            d_codebook += codebook_gradient(arriving, indices[rows], scale[rows], len(codebook))
    return d_scale, d_codebook


def row_chunks(weight: Tensor) -> list[slice]:
    """Return slices of rows that hold as many weights each as the device takes at once."""
    num_rows, num_inputs = weight.shape
    step = max(1, min(num_rows, numbers_at_once(weight.device) // num_inputs))
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def codebook_range(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ends of a codebook's range: half a step beyond its outer values."""
    low = codebook[0] - (codebook[1] - codebook[0]) / 2
    high = codebook[-1] + (codebook[-1] - codebook[-2]) / 2
    return low, high


def sum_groups(values: Tensor, num_groups: int) -> Tensor:
    """Return the (O, G) sums of an (O, I) tensor over each group."""
    if num_groups == values.shape[1]:
        return values
    return values.view(values.shape[0], num_groups, -1).sum(-1)


def codebook_gradient(gradient: Tensor, indices: Tensor, scale: Tensor, num_values: int) -> Tensor:
    """Return, per codebook value, the sum of gradient * scale over its weights, (C,)."""
    pulled = times_scale(gradient, scale)
    indices, claim = indices.float(), torch.empty_like(pulled)
    # A sum per value instead of a scatter: scatters of floats are slow on XLA and unordered on GPU.
    sums = [(pulled * torch.eq(indices, j, out=claim)).sum() for j in range(num_values)]
    return torch.stack(sums)
