import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from qat.runtime import device as module
from qat.runtime.device import Device, random_state, seeded, set_random_state


def test_auto_always_finds_a_device_and_says_why():
    """Detection never fails, and its one line names device, reason and dtype."""
    device = Device.detect()
    assert device.reason in device.describe()
    assert device.dtype in (torch.float32, torch.bfloat16)
    assert torch.ones(2, device=device.torch_device).sum().item() == 2


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:", "xla2", ""])
def test_an_unknown_name_is_refused_with_the_choices(name):
    """The message lists what may be written."""
    with pytest.raises(ValueError, match="not one of auto, cpu, cuda, mps, xla, tpu"):
        Device.detect(name)


@pytest.mark.parametrize("kind", ["cuda", "mps", "xla", "tpu"])
def test_an_absent_device_is_refused_with_the_reason(kind, monkeypatch):
    """A device that is not there is named, and so is the command that tells more."""
    monkeypatch.setattr(module, "why_absent", lambda asked: f"no {asked} here")
    with pytest.raises(ValueError, match=f"--device {kind}: no {kind} here; `qat doctor`"):
        Device.detect(kind)


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        ({"tpu", "xla", "cuda", "cpu"}, "tpu"),
        ({"xla", "cuda", "cpu"}, "xla"),
        ({"cuda", "cpu"}, "cuda"),
        ({"mps", "cpu"}, "mps"),
        ({"cpu"}, "cpu"),
    ],
)
def test_the_order_of_choice(present, chosen, monkeypatch):
    """TorchTPU, then torch_xla, then a GPU, then the CPU."""
    monkeypatch.setattr(module, "why_absent", lambda kind: None if kind in present else "absent")
    assert module.best_kind()[0] == chosen


def test_torch_xla_with_another_torch_is_refused_without_an_import(monkeypatch):
    """Importing the wrong pair dies with an undefined symbol, so metadata must stop it."""
    versions = {"torch": "2.13.0", "torch_xla": "2.9.0", "libtpu": "0.0.21"}
    monkeypatch.setattr("qat.runtime.device.installed_version", versions.get)
    monkeypatch.setattr(
        "qat.runtime.device.accelerator_mismatches",
        lambda: module_mismatches(versions.get),
    )
    monkeypatch.setitem(sys.modules, "torch_xla", None)  # an import would raise ImportError
    with pytest.raises(ValueError, match="does not fit torch_xla 2.9.0, fix it with: pip"):
        Device.detect("xla")


def module_mismatches(version_of):
    from qat.runtime.packages import accelerator_mismatches

    return accelerator_mismatches(version_of)


def test_dtype_words():
    """`auto` is the device's own; the others mean what they say; the rest is refused."""
    device = Device.detect("cpu")
    assert device.dtype_from_name("auto") == device.dtype
    assert device.dtype_from_name("fp32") == torch.float32
    assert device.dtype_from_name("bf16") == torch.bfloat16
    assert device.dtype_from_name("fp16") == torch.float16
    with pytest.raises(ValueError, match="--dtype float is not one of auto, fp32"):
        device.dtype_from_name("float")


@pytest.mark.recipe
def test_memory_of_the_cpu_is_the_process_and_the_machine():
    """Peak grows with what is held; it stays under the total."""
    device = Device.detect("cpu")
    before = device.peak_bytes()
    held = torch.ones(before // 4 + 8_000_000)  # more than all that was, what is free again too
    assert before + 30_000_000 < device.peak_bytes() < device.total_bytes()
    del held


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error."), True),
        (RuntimeError("E1000: CompileTimeHbmOom: used 21.95G of 15.48G"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("device-side assert triggered"), False),
    ],
)
def test_only_too_little_memory_counts_as_out_of_memory(error, expected):
    """Kernel scratch memory and other failures are not cured by a smaller batch."""
    assert Device.detect("cpu").is_out_of_memory(error) is expected


def test_checkpointing_gives_the_same_gradient():
    """Recomputing the forward changes memory, never the result."""
    checkpoint = module.checkpoint_function(torch.device("cpu"))
    layer = torch.nn.Linear(4, 4)
    x = torch.randn(2, 4)
    layer(x).square().sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    checkpoint(layer, x).square().sum().backward()
    assert torch.equal(layer.weight.grad, expected)


def test_a_step_on_the_cpu_needs_no_wait():
    """The loop makes the same calls everywhere; here they change nothing."""
    device = Device.detect("cpu")
    device.sync()
    device.sync(wait=True)


@pytest.fixture
def fake_xla(monkeypatch):
    """Stand in for torch_xla: records calls and makes no tensors."""
    calls = []
    xla, utils, checkpoint = (ModuleType(name) for name in ("torch_xla", "utils", "checkpoint"))
    core, xla_model, runtime = (ModuleType(name) for name in ("core", "xla_model", "runtime"))
    runtime.global_runtime_device_count = lambda: 1
    runtime.addressable_runtime_device_count = lambda: runtime.global_runtime_device_count()
    runtime.is_spmd = lambda: False
    runtime.use_spmd = lambda: calls.append(("use_spmd",))
    xla.device = lambda index=None: torch.device("xla")
    xla.sync = lambda wait=False: calls.append(("sync", wait))
    checkpoint.checkpoint = lambda function, *args: function(*args)
    xla_model.get_memory_info = lambda device: {"bytes_limit": 32, "peak_bytes_used": 7}
    xla.utils, utils.checkpoint, xla.core, core.xla_model = utils, checkpoint, core, xla_model
    for name, value in {
        "torch_xla": xla,
        "torch_xla.utils": utils,
        "torch_xla.utils.checkpoint": checkpoint,
        "torch_xla.core": core,
        "torch_xla.runtime": runtime,
        "torch_xla.core.xla_model": xla_model,
    }.items():
        monkeypatch.setitem(sys.modules, name, value)
    monkeypatch.setattr(module, "why_no_xla", lambda: None)
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    return SimpleNamespace(
        calls=calls, checkpoint=checkpoint.checkpoint, memory=xla_model, runtime=runtime
    )


def test_xla_goes_through_the_functions_of_its_last_release(fake_xla):
    """One hand-over a step, its own checkpoint, memory from its own counters."""
    device = Device.detect("xla")
    assert (device.kind, device.dtype) == ("xla", torch.float32)
    device.sync()
    device.sync(wait=True)
    assert fake_xla.calls == [("sync", False), ("sync", True)]
    assert module.checkpoint_function(torch.device("xla")) is fake_xla.checkpoint
    assert (device.peak_bytes(), device.total_bytes()) == (7, 32)


@pytest.mark.parametrize(("name", "count", "is_one"), [("xla", 4, False), ("xla:0", 4, True)])
def test_one_process_drives_all_chips_unless_one_is_named(fake_xla, name, count, is_one):
    """By SPMD, which is asked for before there is any tensor."""
    fake_xla.runtime.global_runtime_device_count = lambda: count
    Device.detect(name)
    assert fake_xla.calls == ([] if is_one else [("use_spmd",)])


def test_one_process_for_the_chips_of_several_hosts_is_refused(fake_xla):
    """A process drives the chips of its host; with what starts one on each."""
    fake_xla.runtime.global_runtime_device_count = lambda: 16
    fake_xla.runtime.addressable_runtime_device_count = lambda: 4
    with pytest.raises(ValueError, match="4 of 16 chips are this host's.*speedrun/pod.sh"):
        Device.detect("xla")
    assert fake_xla.calls == []


def test_a_place_that_compiles_leaves_odd_shapes_to_the_cpu(fake_xla):
    """Fits and answers have other shapes each time; other devices keep them."""
    assert Device.detect("xla").eager().kind == "cpu"
    cpu = Device.detect("cpu")
    assert cpu.eager() is cpu


def test_a_model_comes_back_to_the_cpu_also_after_an_error():
    """Who hosts a model gives it back, ties and all."""
    device, model = Device.detect("cpu"), torch.nn.Linear(2, 2)
    with pytest.raises(KeyError), device.hosting(model):
        raise KeyError
    assert model.weight.device.type == "cpu"
    assert not torch.__future__.get_swap_module_params_on_conversion()


def test_the_cpu_gets_numbers_as_they_are():
    """Only a traced step takes its rates as tensors; the optimizer follows."""
    cpu = torch.device("cpu")
    assert module.as_operand(0.1, cpu) == 0.1
    assert module.optimizer_settings(cpu) == {"fused": True, "capturable": False}
    assert module.optimizer_settings(torch.device("xla")) == {"fused": False, "capturable": True}


def test_xla_without_memory_counters_counts_the_host_or_says_none(fake_xla, monkeypatch):
    """The CPU client keeps no counters, and its memory is the host's; others' is not known."""

    def refuse(device):
        raise RuntimeError("UNIMPLEMENTED")

    fake_xla.memory.get_memory_info = refuse
    device, cpu = Device.detect("xla"), Device.detect("cpu")
    assert device.total_bytes() == cpu.total_bytes()
    assert 0 < device.peak_bytes() <= cpu.peak_bytes()
    monkeypatch.setenv("PJRT_DEVICE", "TPU")
    assert (device.peak_bytes(), device.total_bytes()) == (None, None)


def test_a_tpu_is_found_through_torch_accelerator_only(monkeypatch):
    """torch.tpu exists without a TPU; what torch.accelerator reports decides."""
    monkeypatch.setattr(torch, "tpu", object(), raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    assert module.why_absent("tpu") is not None
    found = SimpleNamespace(type="tpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: found)
    assert module.why_absent("tpu") is None


@pytest.mark.device
def test_the_accelerator_agrees_with_the_cpu(accelerator):
    """A product on the best device present equals the CPU's to the dtype's precision."""
    device = accelerator
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    product = a.to(device.torch_device, device.dtype) @ b.to(device.torch_device, device.dtype)
    device.sync(wait=True)
    assert torch.allclose(product.float().cpu(), a @ b, rtol=2e-2, atol=2e-1)
    assert device.total_bytes() is None or device.total_bytes() > 0


def test_packages_are_judged_without_importing_torch():
    """The doctor's verdict must come before an import that could end the process."""
    code = (
        "import sys, qat.runtime.packages as p; p.find_mismatches(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


def test_random_generators_continue_after_a_seed_as_before():
    """Inside the block draws follow from the seed alone, after it from what came before."""
    torch.manual_seed(3)
    expected = torch.rand(2, 4)
    torch.manual_seed(3)
    first = torch.rand(4)
    with seeded(torch.device("cpu"), 7):
        inside = torch.rand(4)
    assert torch.equal(torch.stack([first, torch.rand(4)]), expected)
    assert torch.equal(inside, torch.rand(4, generator=torch.Generator().manual_seed(7)))


@pytest.mark.device
def test_an_accelerators_generator_is_saved_and_seeded_as_well(accelerator):
    """Dropout draws from it: a resumed run needs its state."""
    device = accelerator.torch_device
    state = random_state(device)
    expected = torch.rand(4, device=device)
    with seeded(device, 7):
        inside = torch.rand(4, device=device)
    after = torch.rand(4, device=device)
    set_random_state(device, state)
    assert torch.equal(torch.rand(4, device=device), expected)
    with seeded(device, 7):
        assert torch.equal(torch.rand(4, device=device), inside)
    assert torch.equal(torch.rand(4, device=device), after)
