"""Shards: safetensors files of fields, written whole, mapped when read, checked by sha256.

Shape legend: n sequences of a shard, L tokens of a block.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from qat.cache.codec import Fields
from qat.cache.manifest import CacheMismatch, FileEntry
from qat.storage.files import atomic_file, sha256_of_file

# A kill loses at most one shard: 20 s of work at 800 tokens/s; 6 MB with 64 ids a position.
TOKENS_A_SHARD = 16_384
REMEDY = "remove {} and manifest.json and run `qat build-cache` again"
ID_FIELDS = ("input_ids", "token_ids", "draw_ids", "negative_ids")


def sequences_a_shard(seq_len: int) -> int:
    """Return n of every shard but the last."""
    return max(1, TOKENS_A_SHARD // seq_len)


def shard_ranges(num_sequences: int, seq_len: int) -> dict[int, Tensor]:
    """Return each shard's sequence ids, (n,) int64."""
    return dict(enumerate(torch.arange(num_sequences).split(sequences_a_shard(seq_len))))


def shard_name(index: int) -> str:
    """Return a shard's file name."""
    return f"shard_{index:05d}.safetensors"


def id_dtype(vocab_size: int) -> type[np.integer]:
    """Return the smallest dtype that holds the vocabulary's ids."""
    return np.uint16 if vocab_size <= 2**16 else np.int32


def write_fields(
    path: Path, fields: Fields, *, ids: type[np.integer], num_sequences: int
) -> FileEntry:
    """Write fields on the CPU under the final name when whole; return the entry.

    `ids` is the dtype of token ids in the file, `num_sequences` 0 for what is no shard.
    """
    # By numpy, which starts no threads: see `write_shard`.
    stored = {
        name: torch.from_numpy(field.numpy().astype(ids)) if name in ID_FIELDS else field
        for name, field in fields.items()
    }
    data = save({name: field.contiguous() for name, field in stored.items()})
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)
    return FileEntry(
        file=path.name,
        sha256=hashlib.sha256(data).hexdigest(),
        num_bytes=len(data),
        num_sequences=num_sequences,
    )


def entry_of_file(path: Path, num_sequences: int) -> FileEntry:
    """Return the entry of a file that is there already."""
    return FileEntry(
        file=path.name,
        sha256=sha256_of_file(path),
        num_bytes=path.stat().st_size,
        num_sequences=num_sequences,
    )


def read_fields(path: Path) -> Fields:
    """Return a file's fields, mapped: bytes are read where they are touched."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CacheMismatch(f"{path} cannot be read ({error}); fetch it again") from error


def check_size(folder: Path, entry: FileEntry) -> None:
    """Refuse a file that is missing, cut or longer than written."""
    path = folder / entry.file
    found = path.stat().st_size if path.is_file() else 0
    if found != entry.num_bytes:
        raise CacheMismatch(
            f"{path} has {found} bytes, the manifest says {entry.num_bytes}; "
            + REMEDY.format(path.name)
        )


def check_sha256(folder: Path, entry: FileEntry) -> None:
    """Refuse a file whose bytes are not those that were written."""
    if entry.sha256 is None:
        return
    path = folder / entry.file
    found = sha256_of_file(path)
    if found != entry.sha256:
        raise CacheMismatch(
            f"{path} has sha256 {found}, the manifest says {entry.sha256}; "
            + REMEDY.format(path.name)
        )
