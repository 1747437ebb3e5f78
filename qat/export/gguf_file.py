"""Reading a GGUF file's tensors, types included that the `gguf` package does not know (Q2_0).

Layout: magic, version, counts; key-value pairs; one record a tensor (name, sides from the fastest,
type, offset); padding; data. All little-endian.
"""

import math
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qat.grids.blocks import BLOCK_TYPES, unpack_blocks

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32  # the default; this package writes no other
STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of scalar types


class StoredTensor(NamedTuple):
    """Where a tensor lies in a file."""

    type_name: str
    shape: tuple[int, ...]
    """As torch writes it: the fastest axis last."""
    offset: int
    """From the start of the file."""


def read_tensor_records(path: Path) -> dict[str, StoredTensor]:
    """Return where each tensor of a GGUF file lies, by name; refuse other versions and types."""
    names = {kind.number: name for name, kind in BLOCK_TYPES.items()}
    with Path(path).open("rb") as file:
        magic, version = file.read(4), number(file, "<I")
        if magic != MAGIC or version != VERSION:
            raise ValueError(f"{path} is no GGUF file of version {VERSION}; export it again")
        num_tensors, num_pairs = number(file, "<Q"), number(file, "<Q")
        for _ in range(num_pairs):
            skip_text(file)
            skip_value(file, number(file, "<I"))
        records = {}
        for _ in range(num_tensors):
            name = file.read(number(file, "<Q")).decode()
            sides = [number(file, "<Q") for _ in range(number(file, "<I"))]
            type_number, offset = number(file, "<I"), number(file, "<Q")
            if type_number not in names:
                raise ValueError(f"{path}: {name} has type {type_number}, which is unknown here")
            records[name] = StoredTensor(names[type_number], tuple(reversed(sides)), offset)
        start = -(-file.tell() // ALIGNMENT) * ALIGNMENT
    return {name: r._replace(offset=start + r.offset) for name, r in records.items()}


def read_weight(path: Path, record: StoredTensor) -> Tensor:
    """Return a tensor of a GGUF file as float32, by its type's own definition."""
    return unpack_blocks(read_bytes(path, record), record.type_name).view(record.shape)


def read_bytes(path: Path, record: StoredTensor, rows: slice = slice(None)) -> Tensor:
    """Return the bytes of some rows of a tensor, (rows, bytes of a row), uint8."""
    kind = BLOCK_TYPES[record.type_name]
    row_bytes = record.shape[-1] // kind.num_weights * kind.num_bytes
    start, stop, _step = rows.indices(math.prod(record.shape[:-1]))
    count, offset = (stop - start) * row_bytes, record.offset + start * row_bytes
    raw = np.fromfile(path, dtype=np.uint8, count=count, offset=offset)
    if len(raw) != count:
        raise ValueError(f"{path} ends before its last tensor; export it again")
    return torch.from_numpy(raw).view(-1, row_bytes)


def number(file: BinaryIO, form: str) -> int:
    """Return the next integer of a file."""
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def skip_text(file: BinaryIO) -> None:
    """Move past a string."""
    file.seek(number(file, "<Q"), 1)


def skip_value(file: BinaryIO, kind: int) -> None:
    """Move past a key's value."""
    if kind == STRING:
        skip_text(file)
    elif kind == ARRAY:
        of, count = number(file, "<I"), number(file, "<Q")
        if of in SIZES:
            file.seek(SIZES[of] * count, 1)
            return
        for _ in range(count):
            skip_value(file, of)
    else:
        file.seek(SIZES[kind], 1)
