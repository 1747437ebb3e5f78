"""Super-blocks of GGUF's vector types: what follows the float16 d, from indices and sub-scales.

    IQ2_XXS d * (s + 1/2) / 4    s for each 32 weights, a word of four 7-bit signs and s in its top
    IQ2_XS  d * (s + 1/2) / 4    s for each 16, points of 9 bits and signs of 7 in two bytes
    IQ2_S   d * (s + 1/2) / 4    s for each 16, points of 10 bits, signs of 8
    IQ3_XXS d * (s + 1/2) / 2    s for each 32, two points of 4 weights, words as in IQ2_XXS
    IQ3_S   d * (s + 1/2) * 2    s for each 32, points of 4 weights in 9 bits, signs of 4

times points and signs, 256 weights, s in 4 bits. Signs of 7 bits are the first seven of eight.

Shape legend: O out, B super-blocks of a row.

Source: ggml's ggml-common.h and ggml-quants.c (dequantize_row_*).
"""

import torch
from torch import Tensor

SIGNS = 127  # of 8 weights, the last one known


def iq2_xxs_fields(indices: Tensor, sub_scale: Tensor) -> list[Tensor]:
    """Return qs of block_iq2_xxs, (O, B, 64) uint8.

    Args:
        indices: (O, B, 32): a point of 8 bits, and 7 signs above it.
        sub_scale: (O, B, 8) uint8.
    """
    points = low_byte(indices).unflatten(-1, (-1, 4))  # (O, B, 8, 4)
    return [torch.cat([points, sign_words(indices >> 8, sub_scale)], dim=-1).flatten(2)]


def iq2_xs_fields(indices: Tensor, sub_scale: Tensor) -> list[Tensor]:
    """Return qs and scales of block_iq2_xs, (O, B, bytes) each.

    Args:
        indices: (O, B, 32): a point of 9 bits, and 7 signs above it.
        sub_scale: (O, B, 16) uint8.
    """
    both = torch.stack([low_byte(indices), low_byte(indices >> 8)], dim=-1)
    return [both.flatten(2), merged(sub_scale, 4)]


def iq2_s_fields(indices: Tensor, sub_scale: Tensor) -> list[Tensor]:
    """Return qs, signs, qh and scales of block_iq2_s, (O, B, bytes) each.

    Args:
        indices: (O, B, 32): a point of 10 bits, and 8 signs above it.
        sub_scale: (O, B, 16) uint8.
    """
    high = low_byte(indices >> 8) & 3
    return [low_byte(indices), low_byte(indices >> 10), merged(high, 2), merged(sub_scale, 4)]


def iq3_xxs_fields(indices: Tensor, sub_scale: Tensor) -> list[Tensor]:
    """Return qs of block_iq3_xxs, points and then words, (O, B, bytes) each.

    Args:
        indices: (O, B, 32): two points of 8 bits, and 7 signs above them.
        sub_scale: (O, B, 8) uint8.
    """
    points = torch.stack([low_byte(indices), low_byte(indices >> 8)], dim=-1)
    return [points.flatten(2), sign_words(indices >> 16, sub_scale).flatten(2)]


def iq3_s_fields(indices: Tensor, sub_scale: Tensor) -> list[Tensor]:
    """Return qs, qh, signs and scales of block_iq3_s, (O, B, bytes) each.

    Args:
        indices: (O, B, 64): a point of 9 bits, and 4 signs above it.
        sub_scale: (O, B, 8) uint8.
    """
    high, signs = low_byte(indices >> 8) & 1, low_byte(indices >> 9)
    return [low_byte(indices), merged(high, 1), merged(signs, 4), merged(sub_scale, 4)]


IQ_PACKERS = {
    "iq2_xxs": iq2_xxs_fields,
    "iq2_xs": iq2_xs_fields,
    "iq2_s": iq2_s_fields,
    "iq3_xxs": iq3_xxs_fields,
    "iq3_s": iq3_s_fields,
}


def low_byte(indices: Tensor) -> Tensor:
    """Return the lowest 8 bits of indices, uint8."""
    return (indices & 255).to(torch.uint8)


def merged(fields: Tensor, bits: int) -> Tensor:
    """Return neighbours of a few bits as bytes, the first lowest, (O, B, fields * bits / 8)."""
    groups = fields.unflatten(-1, (-1, 8 // bits))
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=fields.device)
    return (groups << places).sum(-1).to(torch.uint8)


def sign_words(signs: Tensor, sub_scale: Tensor) -> Tensor:
    """Return 32 bits for each 32 weights, (O, B, 8, 4): signs of 7 bits, above them a sub-scale.

    Args:
        signs: (O, B, 32), 7 bits of each count.
        sub_scale: (O, B, 8) uint8.
    """
    device = signs.device
    groups = (signs & SIGNS).long().unflatten(-1, (-1, 4))
    words = (groups << torch.arange(0, 28, 7, device=device)).sum(-1) | (sub_scale.long() << 28)
    return low_byte(words.unsqueeze(-1) >> torch.arange(0, 32, 8, device=device))
