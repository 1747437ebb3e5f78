"""Blocks of GGUF types: indices and scales to the bytes that ggml computes with, and back.

    Q4_0    (q - 8) * d        32 weights, q in 4 bits, q of weight j beside that of weight j + 16
    Q4_1    q * d + m          the same layout, m in float16 after d
    IQ4_NL  values[q] * d      the same layout, 16 fixed values
    Q5_0    (q - 16) * d       32 weights, q in 5 bits; Q5_1 is q * d + m
    Q8_0    q * d              32 weights, q in int8
    MXFP4   values[q] * 2**e   32 weights, 15 values of E2M1, e + 127 in one byte
    TQ2_0   (q - 1) * d        256 weights, q in 0 .. 2, d behind them; TQ1_0 holds them in base 3
    Q2_0    (q - 1) * d        64 weights, q in 2 bits, four neighbours a byte, the first lowest
    I2_S    (q - 1) * d        128 weights, q in 2 bits; one d, float32, behind all of a tensor
    IQ2_*, IQ3_*    see `grids/iq_blocks.py`

K-types and IQ4_XS are in `grids/k_blocks.py`. d is float16 of either sign and lies in front of the
block's q, whose bytes `block_bodies` makes. Packing takes indices into an ascending codebook; Q2_0
counts the other way (-2 .. 1 becomes 2 .. -1), so its d is the scale with its sign turned.
Unpacking is that of the `gguf` package, which lacks Q2_0, and does not read `grids/scalar.py`: it
checks what packing made.

Shape legend: O out, I in, G blocks of a row.

Source: ggml's ggml-common.h and ggml-quants.c (dequantize_row_*).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qat.grids.block_bodies import BODIES
from qat.grids.iq_blocks import IQ_PACKERS
from qat.grids.k_blocks import K_FIELDS, pack_k_blocks
from qat.grids.scalar import exponent_bytes
from qat.grids.scales import TENSOR_TAIL_BYTES

D_BYTES = 2


class BlockType(NamedTuple):
    """A GGUF tensor type: its number, weights and bytes of a block, the word for a whole file."""

    number: int
    num_weights: int
    num_bytes: int
    file_type: int
    tail_bytes: int = 0
    """Behind the last block of a tensor."""


BLOCK_TYPES = {
    "f32": BlockType(0, 1, 4, 0),
    "f16": BlockType(1, 1, 2, 1),
    "bf16": BlockType(30, 1, 2, 32),
    "q4_0": BlockType(2, 32, 18, 2),
    "q4_1": BlockType(3, 32, 20, 3),
    "q5_0": BlockType(6, 32, 22, 8),
    "q5_1": BlockType(7, 32, 24, 9),
    "q8_0": BlockType(8, 32, 34, 7),
    "iq4_nl": BlockType(20, 32, 18, 25),
    "q2_0": BlockType(42, 64, 18, 41),
    "iq2_xxs": BlockType(16, 256, 66, 19),
    "iq2_xs": BlockType(17, 256, 74, 20),
    "iq2_s": BlockType(22, 256, 82, 28),
    "mxfp4": BlockType(39, 32, 17, 38),
    "tq1_0": BlockType(34, 256, 54, 36),
    "tq2_0": BlockType(35, 256, 66, 37),
    "i2_s": BlockType(36, 128, 32, 40, TENSOR_TAIL_BYTES),
    "q2_k": BlockType(10, 256, 84, 10),
    "q3_k": BlockType(11, 256, 110, 11),
    "q4_k": BlockType(12, 256, 144, 14),
    "q5_k": BlockType(13, 256, 176, 16),
    "q6_k": BlockType(14, 256, 210, 18),
    "iq4_xs": BlockType(23, 256, 136, 30),
    "iq3_xxs": BlockType(18, 256, 98, 23),
    "iq3_s": BlockType(21, 256, 110, 26),
}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
TAILED = ("i2_s",)  # whose one d lies behind the last block
D_LAST = ("tq1_0", "tq2_0")  # whose d lies behind the block's q


def pack_blocks(indices: Tensor, scale: Tensor, offset: Tensor | None, name: str) -> Tensor:
    """Return the bytes of a weight, (O, bytes of a row), uint8.

    Args:
        indices: (O, I) uint8, into the ascending codebook of the type's grid.
        scale: (O, G), numbers of float16; powers of two for mxfp4.
        offset: (O, G), numbers of float16, for q4_1 and q5_1; None for the others.
        name: A key of `BODIES`.
    """
    num_outputs, num_inputs = indices.shape
    num_weights = BLOCK_TYPES[name].num_weights
    q = indices.view(num_outputs, num_inputs // num_weights, num_weights)  # (O, G, W)
    fields = [BODIES[name](q)]
    if name in TAILED:
        return fields[0].reshape(num_outputs, -1)
    if name == "mxfp4":
        d = exponent_bytes(scale).unsqueeze(-1)
    else:
        d = float16_bytes(-scale if name == "q2_0" else scale)
    if offset is not None:
        fields.insert(0, float16_bytes(offset))
    fields.insert(len(fields) if name in D_LAST else 0, d)
    return torch.cat(fields, dim=-1).reshape(num_outputs, -1)


def float16_bytes(values: Tensor) -> Tensor:
    """Return numbers of float16 as bytes, (..., 2)."""
    return values.to(torch.float16).unsqueeze(-1).contiguous().view(torch.uint8)


def tail_of(scale: Tensor, name: str) -> bytes:
    """Return the bytes behind a tensor's last block, of its scales (O, 1), all alike."""
    if name not in TAILED:
        return b""
    return scale[0].float().cpu().numpy().tobytes().ljust(BLOCK_TYPES[name].tail_bytes, b"\0")


def unpack_blocks(packed: Tensor, name: str, tail: bytes = b"") -> Tensor:
    """Return the weights that bytes stand for, (O, I), float32, as ggml defines the type.

    Args:
        packed: (O, bytes of a row), uint8.
        name: Any of `BLOCK_TYPES`.
        tail: What lies behind the tensor's last block.
    """
    if name in TAILED:
        planes = [(packed.view(len(packed), -1, 32) >> shift) & 3 for shift in (6, 4, 2, 0)]
        q = torch.stack(planes, dim=-2).view(len(packed), -1)
        return (q.float() - 1) * torch.frombuffer(bytearray(tail[:4]), dtype=torch.float32)
    if name in DTYPES:
        return packed.contiguous().view(DTYPES[name]).float()
    if name != "q2_0":
        return unpack_with_gguf(packed, name)
    blocks = packed.reshape(len(packed), -1, BLOCK_TYPES[name].num_bytes)
    d = blocks[..., :D_BYTES].contiguous().view(torch.float16).float()  # (O, G, 1)
    body = blocks[..., D_BYTES:]
    q = torch.stack([(body >> (2 * place)) & 3 for place in range(4)], dim=-1).flatten(2)
    return ((q.float() - 1) * d).view(len(packed), -1)


def pack_parts(indices: Tensor, parts: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the bytes of a weight, (O, bytes of a row), uint8, by the parts that its format has.

    Args:
        indices: As the type's grid has them.
        parts: Scales as `part_shapes` of the type's format names them, as stored.
        name: Any of `BLOCK_TYPES` but the dense ones.
    """
    if name in K_FIELDS:
        return pack_k_blocks(indices, parts, name)
    if name in SUPER_PACKERS:
        return pack_super_blocks(indices, parts, name)
    return pack_blocks(indices, parts["scale"], parts.get("offset"), name)


def pack_super_blocks(indices: Tensor, parts: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the bytes of a weight with super-block scales, (O, bytes of a row), uint8.

    Args:
        indices: As the type's grid has them.
        parts: super_scale, numbers of float16, and sub_scale, integers.
        name: A key of `SUPER_PACKERS`.
    """
    num_outputs, num_blocks = parts["super_scale"].shape
    indices, sub_scale = (
        t.reshape(num_outputs, num_blocks, -1) for t in (indices, parts["sub_scale"])
    )
    d = float16_bytes(parts["super_scale"])
    fields = SUPER_PACKERS[name](indices, sub_scale.to(torch.uint8))
    return torch.cat([d, *fields], dim=-1).reshape(num_outputs, -1)


SUPER_PACKERS = IQ_PACKERS


def unpack_with_gguf(packed: Tensor, name: str) -> Tensor:
    """Return the weights that bytes stand for, (O, I), float32, as `gguf` reads them."""
    import gguf

    number = gguf.GGMLQuantizationType(BLOCK_TYPES[name].number)
    return torch.from_numpy(gguf.quants.dequantize(packed.contiguous().numpy(), number))


def quantize_q8_0(weight: Tensor) -> Tensor:
    """Return the Q8_0 bytes of a dense weight as ggml rounds it, (O, bytes of a row).

    Args:
        weight: (O, I), float32, I a multiple of 32.
    """
    grouped = weight.view(weight.shape[0], -1, 32)
    scale = grouped.abs().amax(-1) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0.0).unsqueeze(-1)
    product = grouped * inverse
    rounded = product.sign() * (product.abs() + 0.5).floor()  # C's roundf: halves away from zero
    indices = (rounded + 128).to(torch.uint8)
    return pack_blocks(indices.view_as(weight), scale, None, "q8_0")


def pack_dense(tensor: Tensor, name: str) -> Tensor:
    """Return the bytes of a dense tensor in f32, f16 or bf16, its last axis in bytes."""
    return tensor.to(DTYPES[name]).contiguous().view(torch.uint8)
