"""Indices to bytes and back: little-endian, first index in the lowest bits, rows back to back."""

import numpy as np
import torch
from torch import Tensor


def pack(indices: Tensor, bits: int) -> Tensor:
    """Return indices as bytes, ceil(count * bits / 8) of them.

    Args:
        indices: Integers below 2**bits, any shape.
        bits: 1..8.
    """
    flat = indices.reshape(-1).to(torch.uint8)
    if bits == 8:
        return flat.clone()
    if 8 % bits == 0:
        per_byte = 8 // bits
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % per_byte)).view(-1, per_byte)
        packed = padded[:, 0].clone()
        for position in range(1, per_byte):
            packed |= padded[:, position] << (position * bits)
        return packed
    stream = (flat.unsqueeze(1) >> torch.arange(bits, dtype=torch.uint8)) & 1  # (N, bits)
    stream = torch.nn.functional.pad(stream.view(-1), (0, -(len(flat) * bits) % 8)).view(-1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8)).sum(dim=1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Return uint8 indices of the given shape from the bytes that `pack` made.

    Raises:
        ValueError: If the bytes are too few or too many for the shape.
    """
    count = int(torch.Size(shape).numel())
    if len(packed) != -(-count * bits // 8):
        raise ValueError(
            f"{len(packed)} bytes do not hold {count} indices of {bits} bits; the file is damaged"
        )
    if bits == 8:
        return packed.clone().view(shape)
    if 8 % bits == 0:
        # One table entry holds a byte's indices as one number: 8 times as quick as shifts.
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        table = (torch.arange(256, dtype=torch.uint8).unsqueeze(1) >> shifts) & (2**bits - 1)
        entries = table.numpy().view(f"u{8 // bits}").ravel()
        unpacked = torch.from_numpy(np.take(entries, packed.numpy()).view(np.uint8))
        return unpacked[:count].view(shape)
    stream = ((packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1).view(-1)
    stream = stream[: count * bits].view(count, bits)
    return (stream << torch.arange(bits, dtype=torch.uint8)).sum(dim=1).to(torch.uint8).view(shape)
