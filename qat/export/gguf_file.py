"""Reading a GGUF file: keys and tensors, also of types that the `gguf` package lacks (Q2_0).

Layout: magic, version, counts; key-value pairs; one record a tensor (name, sides from the fastest,
type, offset); padding; data. All little-endian. Nothing in a file is trusted: a count or an offset
beyond its end is an error before memory is taken for it.
"""

import math
import struct
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qat.export.ggml import dequantize_blocks, open_ggml
from qat.grids.blocks import BLOCK_TYPES, unpack_blocks

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32  # the default; this package writes no other
ALIGNMENT_KEY = "general.alignment"
INT32, FLOAT32, STRING, ARRAY = 5, 6, 8, 9
VOCABULARY = "tokenizer.ggml."
PER_TOKEN = {"scores": FLOAT32, "token_type": INT32}  # lists of one value a token, and their types
FORMS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))  # of scalar types
MOST_ALIGNMENT = 1 << 16
MOST_SIDES = 4  # of a tensor, as ggml has them


class StoredTensor(NamedTuple):
    """Where a tensor lies in a file."""

    type_name: str
    shape: tuple[int, ...]
    """As torch writes it: the fastest axis last."""
    offset: int
    """From the start of the file."""

    @property
    def num_bytes(self) -> int:
        """Return how many bytes its blocks take."""
        num_weights, num_bytes = block_sizes(self.type_name)
        return math.prod(self.shape) // num_weights * num_bytes

    @property
    def tail_bytes(self) -> int:
        """Return how many bytes of the whole tensor follow."""
        return BLOCK_TYPES[self.type_name].tail_bytes if self.type_name in BLOCK_TYPES else 0


class StoredList(NamedTuple):
    """A list among a file's keys, such as the vocabulary, whose values are passed over."""

    of: int
    """Type of its values."""
    count: int
    distinct: int = 0
    """Different strings, of a list of strings."""


class Header(NamedTuple):
    """What stands in front of a file's data."""

    keys: dict[str, str | int | float]
    """Those with one value."""
    lists: dict[str, StoredList]
    tensors: dict[str, StoredTensor]


@cache
def type_names() -> dict[int, str]:
    """Return the name of each tensor type by its number: those of `BLOCK_TYPES` and gguf's."""
    import gguf

    known = {int(kind): kind.name.lower() for kind in gguf.GGMLQuantizationType}
    return known | {kind.number: name for name, kind in BLOCK_TYPES.items()}


@cache
def block_sizes(type_name: str) -> tuple[int, int]:
    """Return the weights and the bytes of a type's block."""
    if type_name in BLOCK_TYPES:
        return BLOCK_TYPES[type_name].num_weights, BLOCK_TYPES[type_name].num_bytes
    import gguf

    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name.upper()]]


def read_tensor_records(path: Path) -> dict[str, StoredTensor]:
    """Return where each tensor of a GGUF file lies, by name; errors are those of `read_header`."""
    return read_header(path).tensors


def read_header(path: Path) -> Header:
    """Return a GGUF file's keys and where its tensors lie.

    Raises:
        ValueError: If it is of another version or damaged, or has types that are unknown here.
    """
    with Path(path).open("rb") as file:
        try:
            if file.read(len(MAGIC)) != MAGIC or number(file, "I") != VERSION:
                raise ValueError(f"it is no GGUF file of version {VERSION}")
            num_tensors, num_pairs = number(file, "Q"), number(file, "Q")
            keys, lists = {}, {}
            for _ in range(num_pairs):
                name = text(file)
                found = value(file, number(file, "I"))
                (lists if isinstance(found, StoredList) else keys)[name] = found
            tensors = read_records(file, num_tensors, keys.get(ALIGNMENT_KEY, ALIGNMENT))
        except (struct.error, ValueError, OverflowError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}); make it again") from error
    return Header(keys, lists, tensors)


def require_vocabulary(path: Path, header: Header) -> None:
    """Refuse a vocabulary over whose lists runtimes would read beyond their ends.

    They take as many scores and types as there are tokens, of the types that they write, and no
    token twice.
    """
    tokens = header.lists.get(f"{VOCABULARY}tokens", StoredList(STRING, 0))
    expected = {"tokens": StoredList(STRING, tokens.count), "merges": StoredList(STRING, 0)}
    expected |= {name: StoredList(kind, tokens.count) for name, kind in PER_TOKEN.items()}
    for name, one in expected.items():
        found = header.lists.get(VOCABULARY + name, one)
        if found.of != one.of or (name != "merges" and found.count != one.count):
            raise ValueError(
                f"{path} has {found.count} {name} of type {found.of} for {tokens.count} tokens; "
                "make it again"
            )
    if tokens.distinct != tokens.count:
        raise ValueError(
            f"{path} has {tokens.distinct} different tokens among {tokens.count}; make it again"
        )
    for name, index in header.keys.items():
        is_id = name.startswith(VOCABULARY) and name.endswith("_token_id")
        if is_id and not (isinstance(index, int) and 0 <= index < tokens.count):
            raise ValueError(f"{path}: {name} is {index}, of {tokens.count} tokens; make it again")


def read_records(file: BinaryIO, num_tensors: int, alignment: object) -> dict[str, StoredTensor]:
    """Return where tensors lie, from a file that stands at the first one's record."""
    is_power = isinstance(alignment, int) and alignment > 0 and not alignment & (alignment - 1)
    if not is_power or alignment > MOST_ALIGNMENT:
        raise ValueError(f"{ALIGNMENT_KEY} is {alignment}")
    names, records = type_names(), {}
    for _ in range(num_tensors):
        name, num_sides = text(file), number(file, "I")
        if name in records or not 0 < num_sides <= MOST_SIDES:
            raise ValueError(f"{name} is there twice, or has {num_sides} sides")
        sides = [number(file, "Q") for _ in range(num_sides)]
        if 0 in sides:
            raise ValueError(f"{name} is empty")
        type_number, offset = number(file, "I"), number(file, "Q")
        if type_number not in names:
            raise ValueError(f"{name} has type {type_number}, which is unknown here")
        records[name] = StoredTensor(names[type_number], tuple(reversed(sides)), offset)
    start = -(-file.tell() // alignment) * alignment
    placed = {name: r._replace(offset=start + r.offset) for name, r in records.items()}
    file_bytes, end = file.seek(0, 2), start
    for name, record in sorted(placed.items(), key=lambda item: item[1].offset):
        if record.offset < end or (record.offset - start) % alignment:
            raise ValueError(f"{name} overlaps another tensor, or lies between two places for one")
        end = record.offset + record.num_bytes + record.tail_bytes
        num_weights, _ = block_sizes(record.type_name)
        if record.shape[-1] % num_weights:
            raise ValueError(f"{name} has rows of {record.shape[-1]}, in blocks of {num_weights}")
        if end > file_bytes:
            raise ValueError(f"it ends before its tensor {name}")
    return placed


def read_weight(path: Path, record: StoredTensor) -> Tensor:
    """Return a tensor of a GGUF file as float32, by its type's own definition."""
    packed = read_bytes(path, record)
    if record.type_name in BLOCK_TYPES:
        tail = read_tail(path, record)
        return unpack_blocks(packed, record.type_name, tail).view(record.shape)
    import gguf

    kind = gguf.GGMLQuantizationType[record.type_name.upper()]
    try:
        found = torch.from_numpy(gguf.dequantize(packed.numpy(), kind))
    except NotImplementedError:  # as of gguf 0.19.0, Q1_0
        packed, count = packed.flatten(), math.prod(record.shape)
        found = dequantize_blocks(open_ggml(), packed, record.type_name, count)
    return found.view(record.shape)


def read_bytes(path: Path, record: StoredTensor, rows: slice = slice(None)) -> Tensor:
    """Return the bytes of some rows of a tensor, (rows, bytes of a row), uint8."""
    num_rows = math.prod(record.shape[:-1])
    row_bytes = record.num_bytes // num_rows
    start, stop, _step = rows.indices(num_rows)
    count, offset = (stop - start) * row_bytes, record.offset + start * row_bytes
    raw = np.fromfile(path, dtype=np.uint8, count=count, offset=offset)
    if len(raw) != count:
        raise ValueError(f"{path} ends before its last tensor; make it again")
    return torch.from_numpy(raw).view(-1, row_bytes)


def read_tail(path: Path, record: StoredTensor) -> bytes:
    """Return the bytes behind a tensor's last block."""
    with Path(path).open("rb") as file:
        file.seek(record.offset + record.num_bytes)
        return file.read(record.tail_bytes)


def number(file: BinaryIO, form: str) -> int | float:
    """Return the next number of a file, in a form of `struct`."""
    return struct.unpack(f"<{form}", file.read(struct.calcsize(form)))[0]


def text(file: BinaryIO) -> str:
    """Return the next string of a file."""
    length, place = number(file, "Q"), file.tell()
    if length > file.seek(0, 2) - place:
        raise ValueError("a string is longer than the file")
    file.seek(place)
    return file.read(length).decode()


def value(file: BinaryIO, kind: int) -> str | int | float | StoredList:
    """Return the value of a key; of a list what it is, after moving past it."""
    if kind == STRING:
        return text(file)
    if kind in FORMS:
        return number(file, FORMS[kind])
    if kind != ARRAY:
        raise ValueError(f"a key has type {kind}")
    of, count = number(file, "I"), number(file, "Q")
    place = file.tell()
    if of in FORMS:
        file.seek(struct.calcsize(FORMS[of]) * count, 1)
    elif of == STRING:
        size, seen = file.seek(0, 2), set()
        file.seek(place)
        for _ in range(count):
            length = number(file, "Q")
            if length > size:
                raise ValueError("a string is longer than the file")
            seen.add(file.read(length))
        return StoredList(of, count, len(seen))
    else:
        raise ValueError(f"a key has a list of type {of}")
    return StoredList(of, count)
