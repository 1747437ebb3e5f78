"""One step is one program: torch_xla's counters tell what was compiled, fetched and left out."""

from dataclasses import replace

import pytest
import torch

from qat.distill.teacher import top_k_signal
from qat.grids.scalar import midpoints, nearest_values, snap_float16
from qat.model.checkpoint import student_tensors
from qat.model.surgery import hold_weights, quantized_layers
from qat.quant.straight_through import SnapBfloat16, SnapFloat16
from qat.runtime.device import Device
from qat.train.config import IntervalsConfig, LossConfig, OptimConfig, TrainConfig
from qat.train.loop import Hooks, train_end_to_end
from qat.train.run_folder import make_trainer
from qat.train.state import Progress, read_state, write_state
from qat.train.step import Batch
from tests.tiny import TINY_MODELS, tiny_student
from tests.xla.counters import during, fallbacks, happened

pytestmark = pytest.mark.xla

WARM_UP = 2  # the first step makes the optimizer's state, the second finds it
STEPS = 5
# Family and plan of a student, and a run's settings: few, as compiling takes most of the time.
CASES = {
    "weights": ("llama", "q2a4", {"layers": "mlp"}),
    "checkpointed": ("llama", "q2a4", {"layers": "mlp", "gradient_checkpointing": True}),
    "low rank": ("llama", "q4_r4", {"layers": "mlp", "trainable": ("scales", "codebooks")}),
    "deploy": ("gemma", "deploy", {"layers": "mlp"}),
    "everything": (
        "qwen3",
        "q2a4",
        {
            "trainable": ("weights", "scales", "codebooks", "norms"),
            "optim": OptimConfig(ema_decay=0.9, weight_decay=0.1),
            "loss": LossConfig(hard_weight=1.0, hard_weight_end=0.0),
            "accumulation_steps": 2,
            "max_steps": STEPS,
        },
    ),
}


def config_of(tmp_path, **changes):
    """Return a run's settings; the files that it names are not read here."""
    folders = {"checkpoint": tmp_path, "cache_dir": tmp_path, "output_dir": tmp_path}
    return TrainConfig(**{**folders, "max_steps": 10, **changes})


def batch(device, seed, family="llama", length=16):
    """Return a micro-batch on a device, made on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(261, (4, length), generator=generator)
    mask = torch.rand(4, length - 1, generator=generator) < 0.7
    signal = top_k_signal(TINY_MODELS[family]()(token_ids).logits[:, :-1], mask, 8)
    return Batch.of(token_ids.to(device.torch_device), signal.to(device.torch_device))


def start(device, config, family="llama", plan="q2a4"):
    """Return a trainer of a tiny student on a device."""
    student = tiny_student(family, plan)
    device.place(student)
    return make_trainer(
        config, student, torch.float32, weight_of=lambda _name: None, sync=device.sync
    )


def take(trainer, config, device, steps, family="llama", length=16):
    """Take steps at a rate that changes; return their losses, still on the device."""
    losses = []
    for step in steps:
        count = config.accumulation_steps
        batches = [batch(device, step * count + n, family, length) for n in range(count)]
        losses.append(trainer.step(batches, (step + 1) / 10, config.hard_weight(step))[0])
    return losses


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_one_program_and_tells_the_losses_of_the_cpu(case, tmp_path):
    """After warm-up nothing compiles, is fetched or left to the CPU; losses agree to 1e-4."""
    family, plan, changes = CASES[case]
    config = config_of(tmp_path, **changes)
    cpu, device = Device.detect("cpu"), Device.detect("xla")
    expected = take(start(cpu, config, family, plan), config, cpu, range(STEPS), family)

    trainer = start(device, config, family, plan)
    losses = take(trainer, config, device, range(WARM_UP), family)
    left, fetched = fallbacks(), happened("TransferFromDeviceTime")
    steps = range(WARM_UP, STEPS)
    assert (
        during("CompileTime", lambda: losses.extend(take(trainer, config, device, steps, family)))
        == 0
    )
    assert happened("TransferFromDeviceTime") == fetched
    assert fallbacks() == left
    assert len({float(loss) for loss in expected}) == STEPS
    assert [float(loss) for loss in losses] == pytest.approx([float(x) for x in expected], rel=1e-4)


def test_another_length_compiles_once(tmp_path):
    """One program a shape, however often the lengths take turns."""
    device, config = Device.detect("xla"), config_of(tmp_path, layers="mlp")
    trainer = start(device, config)
    take(trainer, config, device, range(WARM_UP))
    assert during("CompileTime", lambda: take(trainer, config, device, [2, 3], length=8)) == 1
    assert during("CompileTime", lambda: take(trainer, config, device, [4])) == 0
    assert during("CompileTime", lambda: take(trainer, config, device, [5], length=8)) == 0


def test_the_loop_fetches_no_more_than_it_logs(tmp_path):
    """Loss and gradient norm come in one transfer, and only at steps that are logged."""
    device, config = Device.detect("xla"), config_of(tmp_path, layers="mlp")
    trainer = start(device, config)
    take(trainer, config, device, range(WARM_UP))
    logged = []
    hooks = Hooks(
        rate=lambda progress: (progress.step + 1) / 10,
        hard_weight=lambda _step: None,
        evaluate=dict,
        track=lambda step, values: logged.append(step) if "train/loss" in values else None,
        keep_best=lambda _values, _step: None,
        save=lambda _progress: None,
        restore=lambda: None,
    )
    every = IntervalsConfig(eval_steps=0, log_steps=3, save_steps=3)
    config = replace(config, max_steps=7, accumulation_steps=1, intervals=every)

    def batches_from(first):
        return (batch(device, number) for number in range(first, 100))

    fetched = during(
        "TransferFromDeviceTime", lambda: train_end_to_end(trainer, batches_from, config, hooks)
    )
    assert logged == [3, 6, 7]
    assert fetched == len(logged)


@pytest.mark.parametrize("after", ["cpu", "xla"])
def test_a_state_goes_on_wherever_it_is_read(after, tmp_path):
    """What a run on XLA leaves is resumed there and on the CPU, to the same losses."""
    device, config = Device.detect("xla"), config_of(tmp_path, layers="mlp")
    trainer = start(device, config)
    take(trainer, config, device, range(2))
    write_state(tmp_path, Progress(step=2), trainer)
    expected = [float(loss) for loss in take(trainer, config, device, range(2, 5))]

    other = Device.detect(after)
    resumed = start(other, config)
    progress = read_state(tmp_path, resumed)
    found = [float(loss) for loss in take(resumed, config, other, range(progress.step, 5))]
    assert found == pytest.approx(expected, rel=1e-4 if after == "cpu" else 1e-6)


@pytest.mark.parametrize("snap", [SnapFloat16, SnapBfloat16])
def test_stored_numbers_are_rounded_as_on_the_cpu(snap):
    """A compiler that kept more digits would train what no file holds."""
    device = Device.detect("xla")
    values = torch.randn(4096) * torch.logspace(-6, 3, 4096)
    moved = values.to(device.torch_device)
    assert torch.equal(snap.apply(moved * 1.25).cpu(), snap.apply(values * 1.25))


@pytest.mark.parametrize("plan", ["q2a4", "q4_r4", "deploy", "q2a4_int_g32"])
def test_weights_are_those_of_the_cpu(plan):
    """A weight formed there is what the file stands for, to the bit of what it is made of."""
    device = Device.detect("xla")
    students = [tiny_student(plan=plan) for _ in range(2)]
    device.place(students[1])
    for student in students:
        hold_weights(student, torch.float32)
    for name, layer in quantized_layers(students[0]).items():
        found = quantized_layers(students[1])[name].held_weight.cpu()
        exact = layer.spec.rank == 0  # a product of factors adds up in another order
        same = torch.equal if exact else torch.allclose
        assert same(found, layer.held_weight), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_goes_there_and_back_unchanged(tied):
    """Tied weights are one tensor there as well, and a checkpoint of it holds them once."""
    device, student = Device.detect("xla"), tiny_student(tied=tied)
    before = {name: tensor.clone() for name, tensor in student_tensors(student).items()}
    parameters = dict(student.named_parameters())
    with device.hosting(student):
        assert {p.device.type for p in student.parameters()} == {"xla"}
        assert (student.lm_head.weight is student.get_input_embeddings().weight) is tied
        assert student_tensors(student).keys() == before.keys()
    assert {p.device.type for p in student.parameters()} == {"cpu"}
    assert all(parameters[name] is p for name, p in student.named_parameters())
    after = student_tensors(student)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_nearest_values_are_those_of_the_cpu(bits):
    """Steps from value to value end on them, however a compiler writes an interpolation."""
    device = Device.detect("xla").torch_device
    codebook = snap_float16(torch.randn(2**bits)).sort().values
    values = torch.cat([2 * torch.randn(4096), midpoints(codebook)])
    found = nearest_values(values.to(device), codebook.to(device))
    assert torch.equal(found.cpu(), nearest_values(values, codebook))
