"""AdamW with averages in 8 bits, by torchao: what it keeps, how it trains, how it resumes."""

import pytest
import torch
from torch import nn

from qat.pipelines.train import train
from qat.tracking.record import read_rows
from qat.train.config import IntervalsConfig, OptimConfig, TrainConfig
from qat.train.state import Progress, read_state, write_state
from qat.train.trainable import make_optimizer
from tests.tiny import save_student, tiny_cache, tiny_llama, tiny_student
from tests.train.test_state import make_run, take_step

pytest.importorskip("torchao", reason="`make parity` installs torchao")
pytestmark = pytest.mark.parity
SHAPES = [(64, 256), (96, 64), (128, 96), (8192,), (3, 5)]  # a block within a row, across, none


def parameters_of(seed=0):
    """Return parameters of several shapes with gradients."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters


def optimizer_of(parameters, averages="8bit"):
    """Return an optimizer of them."""
    return make_optimizer({"weights": parameters}, {"weights": 1e-2}, 0.1, averages=averages)


def test_averages_take_two_bytes_a_number():
    """And a scale for each block; small parameters keep float32."""
    parameters = parameters_of()
    optimizer = optimizer_of(parameters)
    optimizer.step()
    for parameter in parameters:
        averages = [optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]
        if parameter.numel() < 4096:
            assert all(type(average) is torch.Tensor for average in averages)
            continue
        held = sum(a.codes.nbytes + a.scale.nbytes for a in averages)
        assert held == parameter.numel() * 2 * (1 + 4 / 256)


def test_steps_are_torchaos_own(monkeypatch):
    """Rows at a time give the bits of whole parameters, as torchao goes over them."""
    from qat.train import adamw_8bit

    monkeypatch.setattr(adamw_8bit, "NUMBERS_AT_ONCE", 4096)
    ours, theirs = parameters_of(), parameters_of()
    optimizer = optimizer_of(ours)
    assert len(optimizer.row_chunks(ours[0])) == 4
    rates = {"lr": 1e-2, "weight_decay": 0.1}
    plain = adamw_8bit.AdamW8bit(theirs, **rates)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(3):
            optimizer.step()
            plain.step()
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left, right)


def test_steps_are_near_those_in_float32():
    """After ten steps what moved differs by a few percent."""
    few, full = parameters_of(), parameters_of()
    start = [parameter.detach().clone() for parameter in full]
    optimizers = optimizer_of(few), optimizer_of(full, None)
    for step in range(10):
        for optimizer, parameters in zip(optimizers, (few, full), strict=True):
            for parameter, other in zip(parameters, parameters_of(step), strict=True):
                parameter.grad = other.grad
            optimizer.step()
    for left, right, before in zip(few, full, start, strict=True):
        assert (left - right).norm() < 0.1 * (right - before).norm()


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    """Two steps, a state, two more: the same bits in another process that read the state."""
    shape = {"hidden_size": 64, "intermediate_size": 128}
    run = make_run(averages="8bit", **shape)
    for _ in range(2):
        take_step(run)
    write_state(tmp_path, Progress(step=2), run)
    for _ in range(2):
        take_step(run)
    other = make_run(averages="8bit", **shape)
    read_state(tmp_path, other)
    kept = [value for state in other.optimizer.state.values() for value in state.values()]
    assert any(hasattr(value, "codes") for value in kept)
    for _ in range(2):
        take_step(other)
    for left, right in zip(run.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_run_trains(tmp_path):
    """`qat train --optim.averages 8bit` lowers the loss, to nearly where float32 does."""
    shape = {"hidden_size": 64, "intermediate_size": 128}
    cache = tiny_cache(tmp_path, tiny_llama(**shape))
    base = {"path": str(tmp_path / "teacher"), "name": "teacher", "weights": None}
    student = tiny_student(**shape)
    student = save_student(tmp_path / "q2", student, tmp_path / "teacher", base_model=base)
    found = {}
    for averages in (None, "8bit"):
        config = TrainConfig(
            checkpoint=student,
            cache_dir=cache,
            output_dir=tmp_path / f"run-{averages}",
            max_steps=8,
            batch_size=4,
            device="cpu",
            dtype="fp32",
            optim=OptimConfig(lr=2e-3, averages=averages),
            intervals=IntervalsConfig(eval_samples=2, log_steps=1, save_steps=4),
        )
        train(config)
        rows = read_rows(config.output_dir)
        found[averages] = [row["train/loss"] for row in rows if "train/loss" in row]
    assert found["8bit"][-1] < found["8bit"][0]
    assert found["8bit"] == pytest.approx(found[None], rel=0.05)
