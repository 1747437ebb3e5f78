import copy
import json
import resource

import pytest
import torch

from qat.distill.kl import forward_kl
from qat.storage.files import read_json, write_json
from qat.train.ema import MovingAverage
from qat.train.state import (
    POSITION,
    STATE,
    Progress,
    StateWriter,
    has_state,
    read_state,
    whole_states,
    write_state,
)
from qat.train.step import Trainer, loss_scale
from qat.train.trainable import choose_trainable, make_optimizer, trained_layers
from tests.tiny import tiny_student

PARTS = ("weights", "scales", "codebooks", "norms")
TOKEN_IDS = torch.arange(12).view(2, 6)


def make_run(plan="q2a4", decay=0.0, averages=None, **changes):
    """Return a trainer of a student, with a moving average where it decays."""
    student = tiny_student(plan=plan, **changes)
    chosen = choose_trainable(
        student, kinds=("mlp", "attention"), parts=PARTS, weight_of=lambda _name: None
    )
    optimizer = make_optimizer(chosen, dict.fromkeys(chosen, 1e-2), averages=averages)
    parameters = [p for part in chosen.values() for p in part]
    return Trainer(
        model=student,
        layers=trained_layers(student),
        optimizer=optimizer,
        divergence=forward_kl,
        dtype=torch.float32,
        clip_grad_norm=0.0,
        sync=lambda: None,
        ema=MovingAverage(parameters, decay) if decay else None,
    )


def take_step(trainer):
    trainer.model(TOKEN_IDS, use_cache=False).logits.square().mean().backward()
    trainer.before_update()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    if trainer.ema:
        trainer.ema.update()


@pytest.mark.recipe
@pytest.mark.parametrize(("plan", "decay"), [("q2a4", 0.9), ("q4_r4", 0.0)])
def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path, plan, decay):
    """Two steps, a state, two more: the same bits in another process that read the state."""
    run = make_run(plan, decay)
    for _ in range(2):
        take_step(run)
    progress = Progress(step=2, tokens_seen=24, best_kl_nats=0.5, last_eval={"kl_nats": 0.5})
    torch.manual_seed(5)
    write_state(tmp_path, progress, run)
    expected = torch.rand(3)
    for _ in range(2):
        take_step(run)

    other = make_run(plan, decay)
    torch.manual_seed(99)
    assert read_state(tmp_path, other) == progress
    assert torch.equal(torch.rand(3), expected)
    for _ in range(2):
        take_step(other)
    for left, right in zip(run.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(left, right)
    if decay:
        for left, right in zip(run.ema.averages, other.ema.averages, strict=True):
            assert torch.equal(left, right)


def test_there_is_no_state_before_one_is_written(tmp_path):
    """An empty folder starts from the beginning."""
    assert not has_state(tmp_path)
    trainer = make_run()
    write_state(tmp_path, Progress(step=1), trainer)
    assert has_state(tmp_path)


@pytest.mark.recipe
def test_a_state_cut_short_by_a_kill_is_none(tmp_path):
    """The one before is read, and the next save removes what is there of it."""
    trainer = make_run()
    writer = StateWriter(tmp_path, keep=2)
    for step in (7, 8):
        writer.save(Progress(step=step), trainer)
    writer.wait()
    (tmp_path / STATE / "step_0000008" / "state.json").unlink()
    assert read_state(tmp_path, trainer).step == 7
    write_state(tmp_path, Progress(step=9), trainer)
    assert [path.name for path in (tmp_path / STATE).iterdir()] == ["step_0000009"]


@pytest.mark.recipe
def test_a_state_is_of_the_moment_of_its_save(tmp_path):
    """Training goes on while it is written."""
    trainer = make_run()
    take_step(trainer)
    before = copy.deepcopy(trainer.model.state_dict())
    writer = StateWriter(tmp_path)
    writer.save(Progress(step=1), trainer)
    for _ in range(3):
        take_step(trainer)
    writer.wait()
    other = make_run()
    read_state(tmp_path, other)
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.recipe
def test_the_last_states_stay_and_those_of_round_steps(tmp_path):
    """Others make room."""
    trainer = make_run()
    writer = StateWriter(tmp_path, keep=2, keep_every=4)
    for step in range(1, 11):
        writer.save(Progress(step=step), trainer)
    writer.wait()
    kept = [path.name for path in whole_states(tmp_path / STATE)]
    assert kept == [f"step_{step:07d}" for step in (4, 8, 9, 10)]


def test_a_state_of_an_earlier_version_is_refused(tmp_path):
    """Rather than passed over, which would start the run again."""
    (tmp_path / STATE).mkdir()
    (tmp_path / STATE / "state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"state.pt is of an earlier version, .* to start over"):
        has_state(tmp_path)


def test_a_state_of_another_step_is_refused(tmp_path):
    """One beyond the last step never came to it."""
    trainer = make_run()
    write_state(tmp_path, Progress(step=1), trainer)
    path = tmp_path / STATE / "step_0000001" / POSITION
    write_json(path, {**read_json(path), "step": 7})
    with pytest.raises(ValueError, match=r"state.json says step 7; remove .*step_0000001 to"):
        read_state(tmp_path, trainer)


def test_a_changed_byte_is_seen(tmp_path):
    """Rather than trained on; the remedy is to start over."""
    trainer = make_run()
    write_state(tmp_path, Progress(step=1), trainer)
    (path,) = (tmp_path / STATE).glob("step_0000001/*.distcp")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"does not match its sha256; remove .*step_0000001 to"):
        read_state(tmp_path, trainer)


@pytest.mark.recipe
def test_a_full_disk_leaves_the_former_state(tmp_path):
    """torch reports a failed write as RuntimeError, which ended in a traceback."""
    trainer = make_run()
    take_step(trainer)
    write_state(tmp_path, Progress(step=1), trainer)
    before = copy.deepcopy(trainer.model.state_dict())
    take_step(trainer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="no space for the state .* run the same command again"):
            write_state(tmp_path, Progress(step=2), trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in whole_states(tmp_path / STATE)] == ["step_0000001"]
    assert read_state(tmp_path, trainer).step == 1
    assert all(
        torch.equal(trainer.model.state_dict()[name], value) for name, value in before.items()
    )


def test_what_else_keeps_a_state_from_being_saved_is_told(tmp_path):
    """Every fault of the system was told as a full disk, also a folder that was taken away."""
    trainer = make_run()
    (tmp_path / STATE).write_text("no folder")
    with pytest.raises(OSError, match=r"could not be saved \(.*Not a directory"):
        write_state(tmp_path, Progress(step=1), trainer)


def test_the_loss_scale_of_float16_comes_back(tmp_path):
    """A resumed run would otherwise start at a scale that overflows again."""
    trainer, other = make_run(), make_run()
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    other.scaler = torch.amp.GradScaler("cpu")
    loss_scale(trainer.scaler, torch.device("cpu"))  # makes it a tensor, as a step does
    write_state(tmp_path, Progress(step=1), trainer)
    read_state(tmp_path, other)
    assert other.scaler.get_scale() == 64.0


@pytest.mark.recipe
def test_a_state_that_fits_no_run_is_named(tmp_path):
    """With its folder, whose removal starts the run over: its student has other scales."""
    run = make_run("q4_r4")
    take_step(run)
    write_state(tmp_path, Progress(step=1), run)
    with pytest.raises(ValueError, match=r"step_0000001 cannot be read .*remove .* to start over"):
        read_state(tmp_path, make_run("q2a4"))


@pytest.mark.parametrize("values", [[], {}, {"step": "1"}, {"step": -1}, {"steps": 1}])
def test_a_position_that_is_none_is_named(tmp_path, values):
    """state.json is of another version, or was changed."""
    write_state(tmp_path, Progress(step=1), make_run())
    path = tmp_path / STATE / "step_0000001" / "state.json"
    sums = read_json(path)["sha256"]
    path.write_text(json.dumps({**values, "sha256": sums} if values else values))
    with pytest.raises(ValueError, match=r"state\.json: .* to start over"):
        read_state(tmp_path, make_run())
