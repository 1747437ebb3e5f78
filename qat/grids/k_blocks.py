"""Blocks of llama.cpp's K-types and of IQ4_XS: 256 weights a block, d and dmin in float16.

    Q2_K    d * s * q - dmin * m      s and m in 4 bits for each 16, q in 2 bits
    Q3_K    d * (s - 32) * (q - 4)    s in 6 bits for each 16, q in 3 bits
    Q4_K    d * s * q - dmin * m      s and m in 6 bits for each 32, q in 4 bits
    Q5_K    the same                  q in 5 bits
    Q6_K    d * s * (q - 32)          s in int8 for each 16, q in 6 bits
    IQ4_XS  d * (s - 32) * values[q]  s in 6 bits for each 32, q in 4 bits: the values of IQ4_NL

Shape legend: O out, B blocks of a row, N integers of a block.

Source: ggml's ggml-common.h and ggml-quants.c (dequantize_row_*).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def spread(values: Tensor, bits: int, stride: int) -> Tensor:
    """Return bytes of integers below 2**bits, (O, B, bytes) of (O, B, N) uint8.

    A byte holds integers that lie `stride` apart, the first in the lowest bits.
    """
    chunks = values.unflatten(-1, (-1, 8 // bits, stride))
    return sum(chunks[..., k, :] << (bits * k) for k in range(chunks.shape[-2])).flatten(2)


def q2_k_fields(q: Tensor, s: Tensor, m: Tensor, d: list[Tensor]) -> list[Tensor]:
    """Return scales, qs, d and dmin."""
    return [s | (m << 4), spread(q, 2, 32), *d]


def q3_k_fields(q: Tensor, s: Tensor, _m: None, d: list[Tensor]) -> list[Tensor]:
    """Return hmask, qs, scales and d."""
    scales = [spread(s & 15, 4, 8), spread(s >> 4, 2, 4)]
    return [spread(q >> 2, 1, 32), spread(q & 3, 2, 32), *scales, *d]


def q4_k_fields(q: Tensor, s: Tensor, m: Tensor, d: list[Tensor]) -> list[Tensor]:
    """Return d, dmin, scales and qs."""
    return [*d, *pairs_of_six(s, m), spread(q, 4, 32)]


def q5_k_fields(q: Tensor, s: Tensor, m: Tensor, d: list[Tensor]) -> list[Tensor]:
    """Return d, dmin, scales, qh and qs."""
    return [*d, *pairs_of_six(s, m), spread(q >> 4, 1, 32), spread(q & 15, 4, 32)]


def q6_k_fields(q: Tensor, s: Tensor, _m: None, d: list[Tensor]) -> list[Tensor]:
    """Return ql, qh, scales and d; flipping the top bit of a scale makes int8 of it."""
    return [spread(q & 15, 4, 64), spread(q >> 4, 2, 32), s ^ 128, *d]


def iq4_xs_fields(q: Tensor, s: Tensor, _m: None, d: list[Tensor]) -> list[Tensor]:
    """Return d, scales_h, scales_l and qs."""
    return [*d, spread(s >> 4, 2, 1), spread(s & 15, 4, 1), spread(q, 4, 16)]


def pairs_of_six(s: Tensor, m: Tensor) -> list[Tensor]:
    """Return the 12 bytes of 8 scales and 8 mins of 6 bits: top bits of the later in the first."""
    (s, s_later), (m, m_later) = (t.chunk(2, dim=-1) for t in (s, m))
    first = [early | (later >> 4 << 6) for early, later in ((s, s_later), (m, m_later))]
    return [*first, (s_later & 15) | ((m_later & 15) << 4)]


Fields = Callable[[Tensor, Tensor, Tensor | None, list[Tensor]], list[Tensor]]
K_FIELDS: dict[str, Fields] = {
    "q2_k": q2_k_fields,
    "q3_k": q3_k_fields,
    "q4_k": q4_k_fields,
    "q5_k": q5_k_fields,
    "q6_k": q6_k_fields,
    "iq4_xs": iq4_xs_fields,
}


def pack_k_blocks(indices: Tensor, parts: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the bytes of a weight, (O, bytes of a row), uint8.

    Args:
        indices: (O, I) uint8, into the ascending codebook of the type's grid.
        parts: super_scale, numbers of float16, and sub_scale, integers; of Q2_K, Q4_K and Q5_K
            super_offset and sub_offset as well.
        name: A key of `K_FIELDS`.
    """
    shape = (*parts["super_scale"].shape, -1)  # (O, B, N)
    integers = [
        parts[part].to(torch.uint8).reshape(shape) if part in parts else None
        for part in ("sub_scale", "sub_offset")
    ]
    supers = [
        parts[part].to(torch.float16).reshape(shape).view(torch.uint8)
        for part in ("super_scale", "super_offset")
        if part in parts
    ]
    fields = K_FIELDS[name](indices.reshape(shape), *integers, supers)
    return torch.cat(fields, dim=-1).flatten(1)
