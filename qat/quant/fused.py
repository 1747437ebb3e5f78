"""Fake quantization in one pass over a weight, by Triton; `straight_through` has the formulas.

On a GPU each elementwise operation of torch reads and writes the whole weight, and rounding to a
codebook of C values takes some 2 C of them. These kernels are written to form the weights of torch
to the bit: quotients are rounded to nearest, and no product is fused with a sum. Tests run them by
Triton's interpreter, and on a GPU where there is one.

The only module that names triton; it is imported where a weight is on a GPU.

Shape legend: O out, I in, G scales of a row, C codebook values; a tile is some groups by the
weights of one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.grids.scalar import ScalarGrid

TILE = 4096  # weights of a program
WIDEST = 16384  # weights of a group: more do not stay in registers

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@triton.jit
def nearest(
    v, codebook, LOW: tl.constexpr, COUNT: tl.constexpr, STEPS: tl.constexpr, HALVES: tl.constexpr
):
    """Return the codebook values nearest to v; a tie, and what is no number, goes to the lower."""
    if STEPS:
        q = tl.ceil(v) - 0.5 if HALVES else tl.floor(tl.ceil(v * 2.0) * 0.5)
        q = tl.where(v == v, q, LOW)
        q = tl.minimum(tl.maximum(q, LOW), LOW + COUNT - 1)
    else:
        below = tl.load(codebook)
        q = tl.zeros_like(v) + below
        for j in tl.static_range(1, COUNT):
            value = tl.load(codebook + j)
            q = tl.where(v > (value + below) / 2, value, q)
            below = value
    return q


@triton.jit
def form_kernel(  # noqa: PLR0913 what a kernel works on are its arguments
    latent, scale, offset, codebook, out, num_groups,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    LOW: tl.constexpr, COUNT: tl.constexpr, STEPS: tl.constexpr, HALVES: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):  # fmt: skip
    """Write the weights of some groups."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, WIDTH)
    place = group[:, None].to(tl.int64) * SIZE + column[None, :]
    is_there = (group[:, None] < num_groups) & (column[None, :] < SIZE)
    w = tl.load(latent + place, mask=is_there, other=0.0)
    s = tl.load(scale + group, mask=group < num_groups, other=1.0)[:, None]
    if HAS_OFFSET:
        z = tl.load(offset + group, mask=group < num_groups, other=0.0)[:, None]
        w = w - z
    value = nearest(tl.div_rn(w, s + tl.zeros_like(w)), codebook, LOW, COUNT, STEPS, HALVES) * s
    if HAS_OFFSET:
        value = value + z
    tl.store(out + place, value.to(out.dtype.element_ty), mask=is_there)


@triton.jit
def gradient_kernel(  # noqa: PLR0913
    latent, scale, offset, codebook, gradient, d_latent, d_scale, d_offset, num_groups,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    LOW: tl.constexpr, COUNT: tl.constexpr, STEPS: tl.constexpr, HALVES: tl.constexpr,
    HAS_OFFSET: tl.constexpr, HAS_LATENT: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """Write the gradients of some groups: of weights, scales and offsets."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, WIDTH)
    place = group[:, None].to(tl.int64) * SIZE + column[None, :]
    is_there = (group[:, None] < num_groups) & (column[None, :] < SIZE)
    w = tl.load(latent + place, mask=is_there, other=0.0)
    g = tl.load(gradient + place, mask=is_there, other=0.0).to(tl.float32)
    s = tl.load(scale + group, mask=group < num_groups, other=1.0)[:, None]
    if HAS_OFFSET:
        w = w - tl.load(offset + group, mask=group < num_groups, other=0.0)[:, None]
    v = tl.div_rn(w, s + tl.zeros_like(w))
    v = tl.where(v == v, v, 0.0)
    first, last = tl.load(codebook), tl.load(codebook + COUNT - 1)
    low = first - (tl.load(codebook + 1) - first) / 2
    high = last + (last - tl.load(codebook + COUNT - 2)) / 2
    is_inside = (v >= low) & (v <= high)
    inside = is_inside.to(tl.float32)
    if HAS_SCALE:
        q = nearest(v, codebook, LOW, COUNT, STEPS, HALVES)
        slope = q - tl.where(is_inside, v, 0.0)
        tl.store(d_scale + group, tl.sum(slope * g, axis=1), mask=group < num_groups)
    if HAS_OFFSET:
        tl.store(d_offset + group, tl.sum(g * (1.0 - inside), axis=1), mask=group < num_groups)
    if HAS_LATENT:
        tl.store(d_latent + place, g * inside, mask=is_there)


def serves(scale: Tensor, num_inputs: int) -> bool:
    """Return whether the groups of a weight with scales (O, G) fit a tile."""
    return num_inputs // scale.shape[1] <= WIDEST


def form(
    latent: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    codebook: Tensor,
    grid: ScalarGrid,
    dtype: torch.dtype,
) -> Tensor:
    """Return W_hat, (O, I), as `straight_through.fake_quantize` has it; the codebook ascends."""
    latent, scale, codebook = latent.contiguous(), scale.contiguous(), codebook.contiguous()
    out = torch.empty(latent.shape, dtype=dtype, device=latent.device)
    tiles, sizes = tiling(latent, scale)
    form_kernel[tiles](
        latent,
        scale,
        scale if offset is None else offset.contiguous(),
        codebook,
        out,
        scale.numel(),
        **sizes,
        **rounding(grid),
        HAS_OFFSET=offset is not None,
        enable_fp_fusion=False,
    )
    return out


def gradients(
    latent: Tensor,
    scales: tuple[Tensor, Tensor | None],
    codebook: Tensor,
    grid: ScalarGrid,
    gradient: Tensor,
    needed: tuple[bool, bool, bool],
    *,
    overwrites: bool = False,
) -> Gradients:
    """Return the gradients of latent weight, scale and offset; None where not needed.

    Args as `straight_through.weight_gradients` takes them.
    """
    (scale, offset), (needs_latent, needs_scale, needs_offset) = scales, needed
    gradient, latent, scale = gradient.contiguous(), latent.contiguous(), scale.contiguous()
    has_offset = offset is not None
    in_place = overwrites and gradient.dtype == torch.float32
    d_latent = gradient if in_place else torch.empty_like(latent)
    d_scale, d_offset = torch.empty_like(scale), torch.empty_like(scale) if has_offset else scale
    tiles, sizes = tiling(latent, scale)
    gradient_kernel[tiles](
        latent,
        scale,
        offset.contiguous() if has_offset else scale,
        codebook.contiguous(),
        gradient,
        d_latent,
        d_scale,
        d_offset,
        scale.numel(),
        **sizes,
        **rounding(grid),
        HAS_OFFSET=has_offset,
        HAS_LATENT=needs_latent,
        HAS_SCALE=needs_scale,
        enable_fp_fusion=False,
    )
    return (
        d_latent if needs_latent else None,
        d_scale if needs_scale else None,
        d_offset if needs_offset and has_offset else None,
    )


def tiling(latent: Tensor, scale: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Return how many programs there are, and the sizes of their tiles."""
    size = latent.shape[1] // scale.shape[1]
    width = triton.next_power_of_2(size)
    groups = max(1, TILE // width)
    return (triton.cdiv(scale.numel(), groups),), {"SIZE": size, "WIDTH": width, "GROUPS": groups}


def rounding(grid: ScalarGrid) -> dict[str, float | int | bool]:
    """Return how a grid rounds."""
    low = grid.first_value
    return {
        "LOW": 0.0 if low is None else float(low),
        "COUNT": grid.num_values,
        "STEPS": low is not None,
        "HALVES": low is not None and bool(low % 1),
    }
