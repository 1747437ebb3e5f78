"""Bytes of the indices in blocks of GGUF types whose weights share one scale.

    nibbles      weight j beside weight j + 16: Q4_0, Q4_1, IQ4_NL
    five bits    the fifth bit of 32 weights first, then nibbles: Q5_0, Q5_1
    MXFP4        nibbles of a sign and a magnitude's place among 0 1/2 1 3/2 2 3 4 6
    TQ2_0        four weights a byte, 32 apart, in each half of 256
    I2_S         four weights a byte, 32 apart in 128, the first highest: as bitnet.cpp has it on
                 x86; its builds for ARM count otherwise
    TQ1_0        five weights a byte in base 3, the first highest, as a share of 256: 32 apart in
                 the first 160 of 256, 16 in the next 80; the last 16 are four a byte

Each function takes positions in the type's ascending codebook, (O, G, W) uint8.

Shape legend: O out, G blocks of a row, W weights of a block.

Source: ggml's ggml-common.h and ggml-quants.c (dequantize_row_*).
"""

import torch
from torch import Tensor

from qat.grids.packing import pack

BASE3_SPANS = ((160, 5), (80, 5), (16, 4))  # weights in turn, and how many of them share a byte
BASE3_RANGE = 3**5


def nibbles(q: Tensor) -> Tensor:
    """Return bytes of a weight in the low half and one half a block later in the high half."""
    low, high = q.chunk(2, dim=-1)
    return low | (high << 4)


def five_bits(q: Tensor) -> Tensor:
    """Return the bytes of the highest bits, the first weight's lowest, then those of the rest."""
    return torch.cat([pack(q >> 4, 1).view(*q.shape[:2], -1), nibbles(q & 15)], dim=-1)


def int8(q: Tensor) -> Tensor:
    """Return signed bytes; position 0 is -128, so that flipping the top bit gives them."""
    return q ^ 128


def falling_pairs(q: Tensor) -> Tensor:
    """Return four neighbours a byte, the first lowest, counted down from the last position."""
    return pack(3 - q, 2).view(*q.shape[:2], -1)


def e2m1(q: Tensor) -> Tensor:
    """Return nibbles of positions among the 15 values -6 .. 6."""
    return nibbles(torch.where(q < 7, 15 - q, q - 7))


def ternary_pairs(q: Tensor) -> Tensor:
    """Return the bytes of TQ2_0, (O, G, 64)."""
    spread = q.unflatten(-1, (2, 4, 32)) << (2 * torch.arange(4, dtype=torch.uint8)).view(4, 1)
    return spread.sum(-2, dtype=torch.uint8).flatten(-2)


def falling_planes(q: Tensor) -> Tensor:
    """Return the bytes of I2_S, (O, G, 32)."""
    spread = q.unflatten(-1, (4, 32)) << torch.tensor([[6], [4], [2], [0]], dtype=torch.uint8)
    return spread.sum(-2, dtype=torch.uint8)


def ternary_base3(q: Tensor) -> Tensor:
    """Return the bytes of TQ1_0, (O, G, 52)."""
    powers = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32)
    fields = []
    spans = q.split([count for count, _ in BASE3_SPANS], dim=-1)
    for span, (count, places) in zip(spans, BASE3_SPANS, strict=True):
        digits = span.unflatten(-1, (places, count // places)).int()
        value = (digits * powers[:places].view(-1, 1)).sum(-2)
        # Rounded up, so that the reader's digits, top bits of byte * 3**n * 3 / 256, are these.
        fields.append((value * 256 + BASE3_RANGE - 1) // BASE3_RANGE)
    return torch.cat(fields, dim=-1).to(torch.uint8)


BODIES = {
    "q4_0": nibbles,
    "q4_1": nibbles,
    "q5_0": five_bits,
    "q5_1": five_bits,
    "q8_0": int8,
    "iq4_nl": nibbles,
    "mxfp4": e2m1,
    "q2_0": falling_pairs,
    "tq1_0": ternary_base3,
    "tq2_0": ternary_pairs,
    "i2_s": falling_planes,
}
