"""The processes that work on one thing: which one this is, and what they tell each other.

torchrun starts them and tells each its rank in the environment. Without it there is one process,
and all that is here does nothing. The only file that names torch.distributed.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from qat.runtime.device import Device, copies_from_pinned, is_traced, run_recorded
from qat.runtime.launch import is_first, num_processes, rank

# What tensors travel by, for each kind of device; objects travel by the host's memory, and so does
# what is on XLA, whose processes are of hosts that each drive their own chips.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xla": "gloo"}
# A process waits so long for another one, which may write a student or a state meanwhile.
PATIENCE = timedelta(minutes=30)
STORE_SECONDS = 10
FAILED = "qat/failed"  # the store's count of processes that failed

# What one process writes and reads alone is meant so.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")

Value = TypeVar("Value")
Items = TypeVar("Items", range, list[int])


@contextmanager
def joined(device: Device) -> Iterator[None]:
    """Have the processes that torchrun started work together inside the block.

    One that fails leaves without a farewell, which would wait for the others: torchrun ends those.

    Raises:
        ValueError: If processes on this kind of device do not find each other by torchrun.
    """
    if num_processes() == 1:
        yield
        return
    if dist.is_initialized():  # a part of a longer work: what one has written, all find after it
        yield
        dist.barrier()
        return
    if device.kind not in BACKENDS:
        raise ValueError(
            f"--device {device.kind} in {num_processes()} processes: torchrun serves "
            f"{' and '.join(BACKENDS)}; start one process"
        )
    dist.init_process_group(BACKENDS[device.kind], timeout=PATIENCE)
    yield
    dist.barrier()
    saving_group.cache_clear()
    mesh.cache_clear()
    dist.destroy_process_group()


def is_first_to_fail() -> bool:
    """Return whether no other process has failed; the store of torchrun outlives them all."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if num_processes() == 1 or not address or not port:
        return True
    try:
        store = dist.TCPStore(
            address, int(port), is_master=False, timeout=timedelta(seconds=STORE_SECONDS)
        )
        return store.add(f"{FAILED}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except dist.DistError:
        return True


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says that another process has gone: gloo raises no type of its own."""
    is_typed = isinstance(error, dist.DistError)
    return is_typed or (type(error) is RuntimeError and "gloo" in str(error).lower())


def total(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, in its place."""
    if dist.is_initialized():
        add_up([value])
    return value


def total_of(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes; the tensor stays as it is."""
    if not dist.is_initialized():
        return value
    return total(value.clone(memory_format=torch.contiguous_format))


def total_number(value: int) -> int:
    """Return the sum of a count over all processes."""
    return sum(gathered(value))


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum each parameter's gradient over all processes, in its place.

    `DistributedDataParallel` would reduce gradients that arrive at parameters in the backward pass,
    in buffers as large as all of them. Those of a step here are made from its weights' gradients
    after the last micro-batch, and few of them where scales alone train.
    """
    if dist.is_initialized():
        add_up([p.grad for p in parameters if p.grad is not None])


def add_up(tensors: list[Tensor]) -> None:
    """Sum tensors over all processes, in their places; by the host where a device is traced."""
    far = [tensor for tensor in tensors if is_traced(tensor.device)]
    if far:  # at once: a look at one value alone would run what leads to it
        run_recorded(far[0].device, wait=True)
    here = [tensor.cpu() if is_traced(tensor.device) else tensor for tensor in tensors]
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in here]:
        work.wait()
    for tensor, summed in zip(tensors, here, strict=True):
        if summed is not tensor:
            # Moved as a vector: XLA makes a constant of a scalar that is 0 or 1.
            tensor.copy_(summed.flatten().to(tensor.device).view(tensor.shape))


def from_first(make: Callable[[], Value]) -> Value:
    """Return what the first process makes; the others wait for it and make nothing."""
    if not dist.is_initialized():
        return make()
    values = [make() if is_first() else None]
    dist.broadcast_object_list(values)
    return values[0]


def share(items: Items) -> Items:
    """Return what of some items this process takes: every so many-th, from its rank on."""
    return items[rank() :: num_processes()] if dist.is_initialized() else items


def gathered(value: Value) -> list[Value]:
    """Return the value of each process, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Value] = [value] * num_processes()
    dist.all_gather_object(values, value)
    return values


def open_stager(device: torch.device) -> DefaultStager:
    """Return what copies tensors to the host in a thread, into the memory of the time before.

    A first touch of memory takes longer than the copy: a page fault for every 4 KB.
    """
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=copies_from_pinned(device),
            use_shared_memory=False,
            use_async_staging=True,
            use_non_blocking_copy=False,
        )
    )


def start_saving(
    tensors: dict[str, Tensor], folder: Path, stager: DefaultStager
) -> tuple[Future[None], Future[object]]:
    """Begin to copy tensors to the host and to write them into a folder.

    What an earlier call with this stager copied must be written by then. What goes wrong in one
    process is raised in all when `saved` asks.

    Returns:
        Done when the tensors are copied, which may change from then on; done when all processes
        have written.
    """
    response = checkpoint.async_save(
        dict(tensors),
        checkpoint_id=folder,
        async_stager=stager,
        process_group=saving_group() if dist.is_initialized() else None,
        no_dist=not dist.is_initialized(),
    )
    return response.staging_completion, response.upload_completion


def saved(saving: Future[object]) -> None:
    """Wait until all processes have written.

    Raises:
        OSError: If one of them could not.
    """
    try:
        saving.result()
    except checkpoint.CheckpointException as error:
        causes = sorted(why_of(error), key=lambda why: not isinstance(why, OSError))
        raise OSError(reasons(error)) from causes[0]


def reasons(error: checkpoint.CheckpointException) -> str:
    """Return on one line what went wrong in any process."""
    return "; ".join(sorted({" ".join(str(why).split()) for why in why_of(error)}))


def why_of(error: checkpoint.CheckpointException) -> list[BaseException]:
    """Return what went wrong in each process that failed."""
    return [why for why, _ in error.failures.values()]


@cache
def saving_group() -> dist.ProcessGroup:
    """Return the group of all processes whose messages do not mix with those of training."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def take_index(folder: Path) -> dict[str, Any]:
    """Return, as JSON holds it, which tensors a folder has just got and where; remove its pickle.

    torch keeps the index as a pickle, which could run code where another wrote it.
    """
    metadata = checkpoint.FileSystemReader(folder).read_metadata()
    (folder / ".metadata").unlink()
    chunks = {
        name: [[list(chunk.offsets), list(chunk.sizes)] for chunk in entry.chunks]
        for name, entry in metadata.state_dict_metadata.items()
    }
    sizes = {
        name: [str(entry.properties.dtype).removeprefix("torch."), list(entry.size)]
        for name, entry in metadata.state_dict_metadata.items()
    }
    stored = [
        [place.fqn, list(place.offset), found.relative_path, found.offset, found.length]
        for place, found in metadata.storage_data.items()
    ]
    return {"sizes": sizes, "chunks": chunks, "stored": stored}


class Reader(checkpoint.FileSystemReader):
    """Reads tensors from the files of a folder by an index."""

    def __init__(self, folder: Path, index: dict[str, Any]):
        super().__init__(folder)
        self.index = index

    def read_metadata(self, *_args: object, **_kwargs: object) -> checkpoint.Metadata:
        """Return what the index says."""
        stored = {
            MetadataIndex(name, torch.Size(place)): _StorageInfo(Path(file).name, start, length)
            for name, place, file, start, length in self.index["stored"]
        }
        entries = {
            name: checkpoint.TensorStorageMetadata(
                TensorProperties(dtype=dtype),
                shape,
                [
                    checkpoint.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                    for offsets, sizes in self.index["chunks"][name]
                ],
            )
            for name, (shape, dtype) in saved_sizes(self.index).items()
        }
        plain = {name: (name,) for name in entries}
        return checkpoint.Metadata(entries, planner_data=plain, storage_data=stored)


def saved_sizes(index: dict[str, Any]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return shape and dtype of each saved tensor."""
    return {
        name: (torch.Size(shape), torch.empty(0, dtype=getattr(torch, dtype)).dtype)
        for name, (dtype, shape) in index["sizes"].items()
    }


def load_saved(tensors: dict[str, Tensor], folder: Path, index: dict[str, Any]) -> None:
    """Fill tensors with what a folder holds under their names, whoever wrote it.

    Raises:
        ValueError: If one of them is not there, or cannot be read.
    """
    reader = Reader(folder, index)
    try:
        checkpoint.load(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())
    except checkpoint.CheckpointException as error:
        raise ValueError(reasons(error)) from error


def own_rows(num_rows: int) -> slice:
    """Return the rows of a weight that this process holds, as `fully_shard` splits it."""
    size = -(-num_rows // num_processes())
    return slice(min(rank() * size, num_rows), min((rank() + 1) * size, num_rows))


def gather_in_use(
    module: nn.Module, parameters: set[nn.Parameter], dtype: torch.dtype, *, keeps: bool
) -> None:
    """Split parameters of a module by rows; it gathers them as it runs.

    Gradients come back as this process's rows of their sums over all processes, in float32.

    Args:
        module: What runs.
        parameters: Those of it that are split, float32, on one device; all others stay whole.
        dtype: What they are gathered in.
        keeps: Whether what is gathered stays until the backward pass, and is not gathered again.
    """
    fully_shard(
        module,
        mesh=mesh(next(module.parameters()).device.type),
        mp_policy=MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        ignored_params=set(module.parameters()) - parameters,
        reshard_after_forward=not keeps,
    )
    module.set_gradient_divide_factor(1.0)  # sums, not means
    module.set_force_sum_reduction_for_comms(True)


@cache
def mesh(kind: str) -> DeviceMesh:
    """Return all processes in a row, with their devices of a kind."""
    return init_device_mesh(kind, (num_processes(),))


def drop_gathered(model: nn.Module) -> None:
    """Have modules gather anew what they gathered, whose rows are about to change."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def own_part(tensor: Tensor) -> Tensor:
    """Return this process's rows of a tensor that is split, another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_part(rows: Tensor, num_rows: int) -> Tensor:
    """Return the tensor of so many rows that the rows of each process make up."""
    shape = torch.Size((num_rows, *rows.shape[1:]))
    return DTensor.from_local(
        rows,
        mesh(rows.device.type),
        [Shard(0)],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is one that the rows of each process make up."""
    return isinstance(tensor, DTensor)


def all_rows(rows: Tensor, num_rows: int) -> Tensor:
    """Return a tensor of so many rows, gathered from the rows of each process."""
    as_bytes = rows.contiguous().flatten(1).view(torch.uint8)  # any dtype travels so
    whole = as_part(as_bytes, num_rows).full_tensor()
    return whole.view(rows.dtype).view(num_rows, *rows.shape[1:])
