"""Fake quantization with straight-through gradients, saving nothing but its inputs.

Forward: v = (latent - Z) / S, W_hat = S * C[nearest(v)] + Z; most grids have no offset Z.
Backward, from dW = dL/dW_hat:

    dlatent = dW                      where v lies on the codebook's range, else 0
    dS      = dW * (C[indices] - v)   on the range (rounding is taken as identity), dW * C outside
    dZ      = 0                       on the range, dW outside
    dC[j]   = sum of dW * S over the weights whose index is j

With frozen indices there is no latent weight and dS = dW * C[indices].

Shape legend: O out, I in, G scales of a row (I where every weight has its own), C codebook values.

Source: Bengio et al. 2013, arXiv:1308.3432 (straight-through); the scale's gradient is that of
LSQ, Esser et al. 2020, arXiv:1902.08153, equation 3.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qat.grids.scalar import ScalarGrid, over_scale, snap_bfloat16, snap_float16, times_scale
from qat.quant.spec import Grid
from qat.runtime.device import has_triton, is_traced, numbers_at_once


class StraightThrough(torch.autograd.Function):
    """A rounding whose gradient is the identity."""

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        """Return the gradient unchanged."""
        return gradient


class SnapFloat16(StraightThrough):
    """Float16 rounding."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        """Return the nearest float16 numbers in the input's dtype."""
        return snap_float16(values)


class SnapBfloat16(StraightThrough):
    """Rounding to numbers of both 16-bit dtypes."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        """Return near numbers of both dtypes in the input's dtype."""
        return snap_bfloat16(values)


class FakeQuantize(torch.autograd.Function):
    """Nearest grid value times scale, straight through to the latent weight."""

    @staticmethod
    def forward(
        ctx,
        latent: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        codebook: Tensor | None,
        grid: Grid,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return W_hat, (O, I), from a latent weight (O, I), scales (O, G), a codebook (C,)."""
        ctx.save_for_backward(latent, scale, offset, codebook)
        ctx.grid = grid
        # XLA sees no writes into views inside an operation of ours.
        if isinstance(grid, ScalarGrid) and not is_traced(latent.device):
            return form_weight(latent, scale, offset, codebook, grid.kind, grid.bits, dtype)
        return round_to_grid(latent, scale, offset, codebook, grid, dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of latent weight (None of indices), scale, offset and codebook."""
        source, scale, offset, codebook = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        found = weight_gradients(ctx.grid, source, (scale, offset), codebook, gradient, needed)
        return *found, None, None


def round_to_grid(
    latent: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor | None,
    grid: Grid,
    dtype: torch.dtype,
) -> Tensor:
    """Return W_hat, (O, I), as `FakeQuantize` gives it."""

    def nearest(rows: slice) -> Tensor:
        offsets = None if offset is None else offset[rows]
        return grid.nearest(over_scale(latent[rows], scale[rows], offsets), codebook)

    return scale_values(nearest, latent.shape, scale, offset, dtype)


@torch.library.custom_op("qat::fake_quantize", mutates_args=())
def form_weight(
    latent: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    kind: str,
    bits: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return `round_to_grid` of a scalar grid; one operation for a compiler, one kernel on a GPU.

    `kind` and `bits` are the grid's.
    """
    grid = scalar_grid(kind, bits)
    if has_triton(latent.device):
        from qat.quant import fused

        if fused.serves(scale, latent.shape[1]):
            return fused.form(latent, scale, offset, codebook, grid, dtype)
    return round_to_grid(latent, scale, offset, codebook, grid, dtype)


@form_weight.register_fake
def like_weight(latent: Tensor, *others: object) -> Tensor:
    """Return what a formed weight looks like."""
    return latent.new_empty(latent.shape, dtype=others[-1])


def scalar_grid(kind: str, bits: float) -> ScalarGrid:
    """Return a grid of an operation's arguments, where whole numbers of bits are floats as well."""
    return ScalarGrid(int(bits) if bits == int(bits) else bits, kind)


class Dequantize(FakeQuantize):
    """Frozen indices times scale, with gradients to scale, offset and codebook."""

    @staticmethod
    def forward(
        ctx,
        indices: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        codebook: Tensor | None,
        grid: Grid,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return W_hat, (O, I), from indices of blocks, scales (O, G), a codebook (C,)."""
        ctx.save_for_backward(indices, scale, offset, codebook)
        ctx.grid = grid
        shape = (len(indices), indices.shape[1] * grid.block_size)
        return scale_values(
            lambda rows: grid.look_up(indices[rows], codebook), shape, scale, offset, dtype
        )


def fake_quantize(
    latent: Tensor,
    scale: Tensor,
    codebook: Tensor | None,
    grid: Grid,
    dtype: torch.dtype = torch.float32,
    *,
    offset: Tensor | None = None,
) -> Tensor:
    """Return the quantized weight that a latent weight stands for, straight through.

    Args:
        latent: (O, I), float32.
        scale: (O, G), one per group of I / G weights; G = I for one per weight.
        codebook: (C,), any order: it is sorted here, so that training may move its values.
            None where the grid has none.
        grid: Rounds.
        dtype: Of the result; the product is rounded to it once.
        offset: (O, G); none when not given.
    """
    codebook = None if codebook is None else codebook.sort().values
    return FakeQuantize.apply(latent, scale, offset, codebook, grid, dtype)


def weight_gradients(
    grid: Grid,
    source: Tensor,
    scales: tuple[Tensor, Tensor | None],
    codebook: Tensor | None,
    gradient: Tensor,
    needed: tuple[bool, bool, bool, bool],
    *,
    formed: Tensor | None = None,
    overwrites: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of latent weight, scale, offset and codebook; None where not needed.

    Args:
        grid: Rounds, or looks values up.
        source: Latent weight, (O, I) float32, or frozen indices, (O, I / block size) integers.
        scales: Scale (O, G), and offset (O, G) or None.
        codebook: (C,), ascending where there is a latent weight; None where the grid has none.
        gradient: dL/dW_hat, (O, I), any float dtype.
        needed: Which of the four gradients are asked for.
        formed: W_hat, (O, I) float32, where it is at hand: spares finding C[indices] of a latent
            weight again, as S * (C[indices] - v) = W_hat - latent. A scale of zero then gets none.
        overwrites: Whether the latent weight's takes the place of a float32 `gradient`.
    """
    is_plain = isinstance(grid, ScalarGrid) and source.is_floating_point() and not needed[3]
    if is_plain and has_triton(source.device):
        from qat.quant import fused

        if fused.serves(scales[0], source.shape[1]):
            found = fused.gradients(
                source, scales, codebook, grid, gradient, needed[:3], overwrites=overwrites
            )
            return *found, None
    arguments = (grid, source, scales, codebook, gradient, needed)
    return gradients_by_chunks(*arguments, formed=formed, overwrites=overwrites)


def gradients_by_chunks(
    grid: Grid,
    source: Tensor,
    scales: tuple[Tensor, Tensor | None],
    codebook: Tensor | None,
    gradient: Tensor,
    needed: tuple[bool, bool, bool, bool],
    *,
    formed: Tensor | None,
    overwrites: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return what `weight_gradients` does, some rows at a time."""
    (scale, offset), (needs_latent, needs_scale, needs_offset, needs_codebook) = scales, needed
    in_place = overwrites and gradient.dtype == torch.float32
    d_latent = (gradient if in_place else torch.empty_like(source)) if needs_latent else None
    d_scale = torch.empty_like(scale) if needs_scale else None
    d_offset = torch.empty_like(offset) if needs_offset and offset is not None else None
    d_codebook = torch.zeros_like(codebook) if needs_codebook else None
    for rows in row_chunks(gradient):
        arriving, part = gradient[rows].float(), source[rows]
        if is_latent := source.is_floating_point():
            offsets = None if offset is None else offset[rows]
            # A scale of zero makes NaN or infinity of a weight, which no product may meet.
            normalized = over_scale(part, scale[rows], offsets).nan_to_num_()
            on_range = grid.clamp(normalized, codebook)
            inside = torch.eq(normalized, on_range, out=torch.empty_like(normalized))  # 0.0 or 1.0
        if d_offset is not None:
            outside = arriving * (1 - inside) if is_latent else arriving
            d_offset[rows] = sum_groups(outside, scale.shape[1])
        if needs_codebook:
            indices = grid.round(normalized, codebook) if is_latent else part
            d_codebook += codebook_gradient(arriving, indices, scale[rows], len(codebook))
        if needs_scale:
            if not is_latent:
                slope = grid.look_up(part, codebook)
            elif formed is not None:
                slope = torch.addcmul(formed[rows], part, inside, value=-1)
            else:
                slope = grid.nearest(normalized, codebook).addcmul_(on_range, inside, value=-1)
            d_scale[rows] = sum_groups(slope.mul_(arriving), scale.shape[1])
        if needs_latent:
            torch.mul(arriving, inside, out=d_latent[rows])
    if needs_scale and formed is not None:
        d_scale.div_(scale).masked_fill_(scale == 0, 0.0)
    return d_latent, d_scale, d_offset, d_codebook


@torch.no_grad()
def scale_values(
    values_of: Callable[[slice], Tensor],
    shape: tuple[int, int],
    scale: Tensor,
    offset: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return W_hat, (O, I), of grid values times scales plus offsets, (O, G) each.

    Args:
        values_of: Makes the values of some rows, float32, which are written over.
        shape: (O, I).
        scale: Of groups.
        offset: None where there is none.
        dtype: Of the result.
    """
    quantized = scale.new_empty(shape, dtype=dtype)
    for rows in row_chunks(quantized):
        values = values_of(rows)
        grouped = values.view(*scale[rows].shape, -1).mul_(scale[rows].unsqueeze(-1))
        if offset is not None:
            grouped += offset[rows].unsqueeze(-1)
        quantized[rows] = values
    return quantized


@torch.no_grad()
def multiply_by_values(gradient: Tensor, values: Tensor) -> None:
    """Multiply a gradient, (O, I), by grid values of another dtype, (O, I), in place."""
    for rows in row_chunks(gradient):
        gradient[rows] *= values[rows].to(gradient.dtype)


def row_chunks(weight: Tensor) -> list[slice]:
    """Return slices of rows that hold as many weights each as the device takes at once."""
    num_rows, num_inputs = weight.shape
    step = max(1, min(num_rows, numbers_at_once(weight.device) // num_inputs))
    return [slice(start, start + step) for start in range(0, num_rows, step)]


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
