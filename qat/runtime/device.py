"""One object for cpu, cuda, mps, xla (torch_xla) and tpu (TorchTPU).

The only file that names an accelerator library. Loops call `device.sync()` after each step and
never ask which device it is; what a device cannot tell is None.
"""

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qat.runtime.launch import local_rank, num_processes
from qat.runtime.memory import end_above, host_bytes, peak_rss_bytes, tune_allocation
from qat.runtime.packages import accelerator_mismatches, installed_version

Kind = Literal["cpu", "cuda", "mps", "xla", "tpu"]
KINDS = get_args(Kind)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GIB = 1024**3
XLA_SEED_BYTES = 8
CHIPS = "chips"  # the one axis that tensors are split along

# XLA says it while compiling, torch while allocating, and the CPU allocator says it differently.
OUT_OF_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|Ran out of memory in memory space hbm|CompileTimeHbmOom"
    r"|out of memory|can't allocate memory|not enough memory",
    re.IGNORECASE,
)
# The same said of a kernel's scratch memory: a smaller batch does not help.
KERNEL_MEMORY = re.compile(r"\bvmem\b", re.IGNORECASE)
LOADERS, PREFETCHED = 2, 4  # processes that read batches, and batches that each reads ahead


@dataclass(frozen=True, slots=True)
class Device:
    """Where tensors live, why there, and how that place counts time and memory."""

    kind: Kind
    torch_device: torch.device
    reason: str
    dtype: torch.dtype
    """Default compute dtype: bf16 where the device multiplies in it, else fp32."""

    @classmethod
    def detect(cls, name: str = "auto") -> "Device":
        """Return the device of "auto", a kind, or a kind with an index such as "cuda:1".

        Raises:
            ValueError: If the name is unknown, the device absent, or its library misfits torch.
        """
        if name == "auto":
            kind, reason = best_kind()
            return open_device(kind, kind, reason)
        kind = name.split(":")[0]
        if not re.fullmatch(rf"({'|'.join(KINDS)})(:\d+)?", name):
            raise ValueError(f"--device {name} is not one of auto, {', '.join(KINDS)}; name one")
        missing = why_absent(kind)
        if missing:
            raise ValueError(f"--device {name}: {missing}; `qat doctor` shows what is there")
        return open_device(kind, name, "asked for")

    def describe(self) -> str:
        """Return one line: device, why, dtype, memory."""
        total = self.total_bytes()
        memory = f", {total / GIB:.1f} GiB" if total else ""
        dtype = dtype_name(self.dtype)
        return f"device {self.torch_device} ({self.reason}), default dtype {dtype}{memory}"

    def dtype_from_name(self, name: str) -> torch.dtype:
        """Return the dtype for "auto", "fp32", "bf16" or "fp16"."""
        if name == "auto":
            return self.dtype
        if name not in DTYPES:
            raise ValueError(f"--dtype {name} is not one of auto, {', '.join(DTYPES)}; name one")
        return DTYPES[name]

    def sync(self, *, wait: bool = False) -> None:
        """End a step; with `wait` return only when all work is done, as a clock needs it.

        On XLA this hands the step's graph over; elsewhere the work is under way already.
        """
        if is_traced(self.torch_device):
            run_recorded(self.torch_device, wait=wait)
        elif wait and self.kind != "cpu":
            torch.accelerator.synchronize(self.torch_device)

    def place(self, model: nn.Module) -> None:
        """Move a model here; its parameters stay the objects they are, so ties hold."""
        move_model(model, self.torch_device)

    @contextmanager
    def hosting(self, model: nn.Module) -> Iterator[None]:
        """Have a model here inside the block, and on the CPU afterwards."""
        self.place(model)
        try:
            yield
        finally:
            move_model(model, torch.device("cpu"))

    def eager(self) -> "Device":
        """Return where work of ever new shapes runs: here, or on the CPU if this one compiles."""
        return Device.detect("cpu") if is_traced(self.torch_device) else self

    def peak_bytes(self) -> int | None:
        """Return the most memory held so far; on the CPU the whole process's."""
        if self.kind == "cpu":
            return peak_rss_bytes()
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated(self.torch_device)
        if self.kind == "xla":
            return xla_memory(self.torch_device).get("peak_bytes_used", of_host(peak_rss_bytes))
        return None

    def reset_peak(self) -> None:
        """Give cached memory back and count the peak anew; a process's own peak stays."""
        if self.kind == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.torch_device)

    def total_bytes(self) -> int | None:
        """Return the memory that a program may use."""
        if self.kind == "cpu":
            return host_bytes()
        if self.kind == "cuda":
            return torch.cuda.get_device_properties(self.torch_device).total_memory
        if self.kind == "mps":
            return torch.mps.recommended_max_memory()
        if self.kind == "xla":
            return xla_memory(self.torch_device).get("bytes_limit", of_host(host_bytes))
        return None

    def limit_memory(self, limit_bytes: int) -> None:
        """Let this process hold no more than a limit, on a GPU of the GPU's memory.

        Elsewhere a watcher ends the process once its resident memory has been above the limit.
        The kernel keeps the highest value, so no peak slips between two looks. rlimits count what
        is reserved and never touched: 0.8 GB of address space, 0.23 of data, for 0.15 after
        `import torch`; 3.7 and 2.6 for 2.1 in a step of SmolLM2-135M.
        """
        if self.kind == "cuda":
            share = min(1.0, limit_bytes / self.total_bytes())
            torch.cuda.set_per_process_memory_fraction(share, self.torch_device)
        else:
            threading.Thread(target=end_above, args=(limit_bytes,), daemon=True).start()

    def chip(self) -> str | None:
        """Return what the accelerator is called, None where it does not tell."""
        if self.kind == "cuda":
            return torch.cuda.get_device_name(self.torch_device)
        return os.environ.get("TPU_ACCELERATOR_TYPE") if self.kind in ("xla", "tpu") else None

    @property
    def shares_host_memory(self) -> bool:
        """Whether `peak_bytes` counts all that the process holds, and not tensors alone."""
        return self.kind == "cpu"

    @property
    def compiles_steps(self) -> bool:
        """Whether the first steps of a shape are compiled, which can take minutes."""
        return self.kind == "xla"

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an error says that the memory is too small, so that less of it may fit."""
        is_typed = isinstance(error, MemoryError | torch.OutOfMemoryError)
        return is_typed or says_out_of_memory(str(error))


def open_device(kind: Kind, name: str, reason: str) -> Device:
    """Return the device of a kind that is known to be present."""
    if kind == "xla":
        import torch_xla

        # No folder for compiled programs is named: torch_xla 2.9.0 writes them and cannot read them
        # back (pytorch/xla#9094), with a warning each. XLA_PERSISTENT_CACHE_PATH is heeded.
        index = name.partition(":")[2]
        if not index:
            drive_all_chips()
        torch_device = torch_xla.device(int(index)) if index else torch_xla.device()
    else:
        torch_device = torch.device(name)
        if kind == "cpu":
            tune_allocation()
        # Each process on a machine has a GPU of its own; some launchers show it no other.
        if kind == "cuda" and num_processes() > 1 and torch_device.index is None:
            torch_device = torch.device(kind, local_rank() % torch.cuda.device_count())
            torch.cuda.set_device(torch_device)
    return Device(kind, torch_device, reason, default_dtype(kind))


def drive_all_chips() -> None:
    """Have this process drive all chips of a host as one device, where there are several (SPMD).

    Raises:
        ValueError: If they are of several hosts, each of which has a process of its own.
    """
    import torch_xla.runtime as xla_runtime

    count, own = (
        xla_runtime.global_runtime_device_count(),
        xla_runtime.addressable_runtime_device_count(),
    )
    if own < count:
        raise ValueError(
            f"--device xla: {own} of {count} chips are this host's, and a process drives one "
            "host's; start it on all hosts by speedrun/pod.sh"
        )
    if count > 1:
        xla_runtime.use_spmd()


def num_chips(device: torch.device) -> int:
    """Return over how many chips a tensor of one process can lie: several on XLA alone."""
    if not is_traced(device):
        return 1
    import torch_xla.runtime as xla_runtime

    return xla_runtime.global_runtime_device_count() if xla_runtime.is_spmd() else 1


def lay_out(tensor: Tensor, *, split: bool) -> Tensor:
    """Have a tensor lie on all chips of its device: rows split over them, or whole on each.

    The compiler splits the work accordingly and adds the communication between chips. Rows that
    make no equal parts stay whole; where there is one chip, nothing happens.
    """
    count = num_chips(tensor.device)
    if count > 1 and tensor.dim():
        import numpy as np
        import torch_xla.distributed.spmd as spmd

        mesh = spmd.Mesh(np.arange(count), (count,), (CHIPS,))
        is_split = split and len(tensor) % count == 0
        rest = [None] * (tensor.dim() - 1)
        spmd.mark_sharding(tensor, mesh, (CHIPS if is_split else None, *rest))
    return tensor


def is_traced(device: torch.device) -> bool:
    """Whether a device records operations and runs them as one compiled program at each sync.

    There a look at a value cuts the program in two, and a number that Python holds may become a
    constant of it, so that another number is another program.
    """
    return device.type == "xla"


def run_recorded(device: torch.device, *, wait: bool = False) -> None:
    """Run what a traced device has recorded; elsewhere the work is under way already."""
    if is_traced(device):
        import torch_xla

        torch_xla.sync(wait=wait)


def numbers_at_once(device: torch.device) -> int:
    """Return how many numbers a chain of elementwise operations takes at once.

    On a CPU few enough for the caches of its cores, on a GPU enough to fill it, and all where the
    work is traced: a program grows with every chunk, and is tiled anyway.
    """
    if is_traced(device):
        return sys.maxsize
    return 2**17 if device.type == "cpu" else 2**24


def checkpoint_function(device: torch.device) -> Callable[..., Any]:
    """Return `run(function, *args)` that recomputes `function` in the backward pass.

    XLA's own is reentrant and takes no keyword arguments: some input must require grad.
    """
    if is_traced(device):
        from torch_xla.utils.checkpoint import checkpoint

        return checkpoint
    from torch.utils.checkpoint import checkpoint

    return partial(checkpoint, use_reentrant=False)


def as_operand(value: float, device: torch.device) -> float | Tensor:
    """Return a number that differs from step to step in a form that leaves the program as it is."""
    if not is_traced(device):
        return value
    # Moved as a vector: XLA makes a constant of a scalar that is 0 or 1.
    return torch.tensor([value]).to(device).squeeze(0)


def optimizer_settings(device: torch.device) -> dict[str, bool]:
    """Return how an optimizer does its work: fused where torch has that, traced where it must."""
    return {"fused": device.type in ("cpu", "cuda"), "capturable": is_traced(device)}


def waits_for_python(device: torch.device) -> bool:
    """Whether a device is done with one kernel of a small model before Python launches the next.

    Compiled, several are one: a GPU gains most by it, and torch brings its compiler there.
    """
    return device.type == "cuda"


@cache
def has_triton(device: torch.device) -> bool:
    """Whether kernels of our own can run on a device: on a GPU, with the compiler of torch."""
    return device.type == "cuda" and installed_version("triton") is not None


def has_float8(device: torch.device) -> bool:
    """Return whether a device multiplies in float8: from Ada and Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def copies_from_pinned(device: torch.device) -> bool:
    """Whether copies between a device and the host are quicker where the host's memory is pinned.

    A GPU copies by itself there; elsewhere the system has to be asked for the memory for nothing.
    """
    return device.type == "cuda"


def loader_settings(device: torch.device) -> dict[str, Any]:
    """Return how a `DataLoader` feeds a device: next to a GPU's work, from memory that it copies.

    A CPU's cores have work of their own, and processes that use XLA must not be copied.
    """
    if not copies_from_pinned(device):
        return {}
    return {"num_workers": LOADERS, "prefetch_factor": PREFETCHED, "pin_memory": True}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the random generators that work on a device draws from, as bytes."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        with random_module(device) as module:
            found = module.get_rng_state()
        if isinstance(found, int):  # XLA's seed, unsigned
            found = torch.tensor(list(found.to_bytes(XLA_SEED_BYTES, "little")), dtype=torch.uint8)
        state[device.type] = found
    return state


def set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    """Put the states of random generators back; one of another kind of device stays as it is."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        kept = state[device.type]
        with random_module(device) as module:
            module.set_rng_state(
                int.from_bytes(bytes(kept.tolist()), "little") if is_traced(device) else kept
            )


@contextmanager
def random_module(device: torch.device) -> Iterator[ModuleType]:
    """Give the module with the random functions of an accelerator, this one of several GPUs."""
    if is_traced(device):
        import torch_xla.core.xla_model as xla_model

        yield xla_model
    else:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield torch.get_device_module(device)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Have random generators start from a seed inside the block, and continue after it as before.

    `torch.manual_seed` alone would start those of every accelerator anew as well.
    """
    previous = random_state(device)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        with random_module(device) as module:
            # An XLA generator's state is its seed.
            (module.set_rng_state if is_traced(device) else module.manual_seed)(seed)
    try:
        yield
    finally:
        set_random_state(device, previous)


def move_model(model: nn.Module, torch_device: torch.device) -> None:
    """Move a model; parameters stay the objects they are also where torch would make others.

    Between two kinds of tensor torch makes each parameter anew, a tied one twice.
    """
    settings = torch.__future__
    previous = settings.get_swap_module_params_on_conversion()
    devices = {torch_device, *(parameter.device for parameter in model.parameters())}
    settings.set_swap_module_params_on_conversion(any(map(is_traced, devices)))
    try:
        model.to(torch_device)
    finally:
        settings.set_swap_module_params_on_conversion(previous)


def best_kind() -> tuple[Kind, str]:
    """Return the kind to use when none is named, and why."""
    reasons: dict[Kind, str] = {
        "tpu": "torch reports a TPU",
        "xla": "torch_xla fits torch and a TPU or PJRT_DEVICE is there",
        "cuda": "torch sees a CUDA device",
        "mps": "torch sees a Metal device",
        "cpu": "no accelerator found",
    }
    return next((kind, reason) for kind, reason in reasons.items() if not why_absent(kind))


def why_absent(kind: Kind) -> str | None:
    """Return why a kind cannot be used, or None where it can."""
    if kind == "tpu":
        # torch.tpu exists also where there is no TPU, so the attribute says nothing.
        found = torch.accelerator.current_accelerator()
        return None if found is not None and found.type == "tpu" else "torch reports no TPU"
    if kind == "xla":
        return why_no_xla()
    if kind == "cuda":
        return None if torch.cuda.is_available() else "torch sees no CUDA device"
    if kind == "mps":
        return None if torch.backends.mps.is_available() else "torch sees no Metal device"
    return None


def why_no_xla() -> str | None:
    """Return why torch_xla cannot be used, from metadata and device files alone."""
    if installed_version("torch_xla") is None:
        return "torch_xla is not installed"
    if mismatches := accelerator_mismatches():
        return f"{mismatches[0].what}, fix it with: {mismatches[0].install}"
    tpu_files = (
        file for name in ("accel[0-9]*", "vfio/[0-9]*") for file in Path("/dev").glob(name)
    )
    if "PJRT_DEVICE" in os.environ or any(tpu_files):
        return None
    return "no TPU found and PJRT_DEVICE is not set (PJRT_DEVICE=CPU runs XLA on the CPU)"


def default_dtype(kind: Kind) -> torch.dtype:
    """Return bf16 where a kind multiplies in it, else fp32."""
    has_bf16 = {
        # Other CPUs emulate bf16 products, slower than fp32.
        "cpu": lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        "mps": lambda: torch.backends.mps.is_macos_or_newer(14, 0),
        "xla": lambda: os.environ.get("PJRT_DEVICE") != "CPU",
        "tpu": lambda: True,
    }
    return torch.bfloat16 if has_bf16[kind]() else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Return the flag's name for a dtype."""
    return {value: name for name, value in DTYPES.items()}.get(dtype, str(dtype))


def says_out_of_memory(text: str) -> bool:
    """Whether a message, of this process or of a probe's, tells of too little memory."""
    return bool(OUT_OF_MEMORY.search(text)) and not KERNEL_MEMORY.search(text)


def xla_memory(device: torch.device) -> dict[str, int]:
    """Return XLA's memory counters; empty where the back end keeps none, as on the CPU."""
    import torch_xla.core.xla_model as xla_model

    try:
        return xla_model.get_memory_info(device)
    except RuntimeError:
        return {}


def of_host(count: Callable[[], int]) -> int | None:
    """Return a count of the host's memory where XLA runs in it, None where it has its own."""
    return count() if os.environ.get("PJRT_DEVICE") == "CPU" else None
