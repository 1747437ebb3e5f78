"""State dicts read from torch files, and written one tensor at a time.

`torch.save` holds all tensors at once, which for the seeds' form is thirteen times the student. The
file is the same: a zip of records, and of `data.pkl`, in which tensors refer to records.

Source: torch 2.13, torch/serialization.py, `_save`; the form is that of torch 1.6 and later.
"""

import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.storage.decode import reading
from qat.storage.files import is_disk_full

STORAGES = {  # what stands for a dtype in a file
    torch.float32: torch.FloatStorage,
    torch.int64: torch.LongStorage,
    torch.int8: torch.CharStorage,
}


class Storage:
    """A record's content, pickled as the fields that torch writes for it."""

    def __init__(self, key: str, tensor: Tensor) -> None:
        """Take the fields."""
        self.fields = ("storage", STORAGES[tensor.dtype], key, "cpu", tensor.numel())


class Record:
    """A tensor whose numbers are in a record, pickled as torch pickles a tensor."""

    def __init__(self, key: str, tensor: Tensor) -> None:
        """Remember what a contiguous tensor was like."""
        hooks: OrderedDict[str, Any] = OrderedDict()
        shape = (tuple(tensor.shape), tensor.stride())
        self.arguments = (Storage(key, tensor), 0, *shape, False, hooks)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Return the call that makes the tensor when read."""
        return torch._utils._rebuild_tensor_v2, self.arguments


class RecordPickler(pickle.Pickler):
    """A pickler that leaves storages to their records."""

    def persistent_id(self, obj: object) -> object:
        """Return a storage's fields, None for anything else."""
        return obj.fields if isinstance(obj, Storage) else None


def read_torch_file(file: Path) -> object:
    """Return what a torch file holds, mapped; files older than torch's zip form are read whole.

    Raises:
        ValueError: If it is cut, or holds code.
    """
    with reading(file, "fetch it again, or give another file of tensors"):
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError, OSError):
            return torch.load(file, map_location="cpu", weights_only=True)


def is_plain(value: object) -> bool:
    """Return whether something that a file held is a dense tensor of real numbers on the CPU."""
    return (
        type(value) is Tensor
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_complex()
        and not value.is_quantized
    )


def write_torch_file(path: Path, tensors: Iterable[tuple[str, Tensor | str]]) -> None:
    """Write a state dict that `torch.load` reads, also with `weights_only` and `mmap`.

    Args:
        path: Written over; not atomic.
        tensors: Names and tensors of float32, int64 or int8, made as they are asked for; a name in
            a tensor's place is that of an earlier one which is the same.
    """
    try:
        write_records(path, tensors)
    except RuntimeError as error:
        if not is_disk_full(error):
            raise
        why = str(error).partition("\n")[0]
        raise OSError(
            f"{path.parent} has no space for a .pt file ({why}); free some space and run the same "
            "command again"
        ) from error


def write_records(path: Path, tensors: Iterable[tuple[str, Tensor | str]]) -> None:
    """Write each tensor's numbers as they come, and last what refers to them."""
    records: OrderedDict[str, Record] = OrderedDict()
    with torch.serialization._open_zipfile_writer(str(path)) as writer:
        for name, tensor in tensors:
            if isinstance(tensor, str):
                records[name] = records[tensor]
                continue
            key = str(len(records))
            # A view's storage may hold more than the view.
            storage = tensor.contiguous().view(-1).untyped_storage()
            if storage.nbytes() != tensor.nbytes:
                storage = tensor.clone().untyped_storage()
            writer.write_record(f"data/{key}", storage, storage.nbytes())
            records[name] = Record(key, tensor.contiguous())
        pickled = io.BytesIO()
        RecordPickler(pickled, protocol=2).dump(records)
        writer.write_record("data.pkl", pickled.getvalue(), len(pickled.getvalue()))
        writer.write_record("byteorder", sys.byteorder, len(sys.byteorder))
