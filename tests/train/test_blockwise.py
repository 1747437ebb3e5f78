import copy
import resource

import pytest
import torch

from qat.distill.teacher import dense_signal
from qat.evaluate.kl import evaluate_batches
from qat.model.head import Tokens, hidden_states
from qat.model.surgery import hold_weights, quantized_layers
from qat.train.blockwise import (
    BlockPlan,
    HiddenStates,
    Teacher,
    advance,
    block_loss,
    calls_of,
    start_states,
    train_blockwise,
)
from qat.train.trainable import choose_trainable, make_optimizer
from tests.tiny import TINY_MODELS, tiny_student

NUM_SEQUENCES, LENGTH = 10, 8


def token_ids():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(261, (NUM_SEQUENCES, LENGTH), generator=generator)


def plan(folder, **changes):
    usual = {
        "num_epochs": 3,
        "batch_size": 4,
        "rate": lambda step, num_steps: 1.0,
        "clip_grad_norm": 0.0,
        "seed": 0,
        "dtype": torch.float32,
        "scratch": folder,
    }
    return BlockPlan(**{**usual, **changes})


def train(student, teacher, block_plan, *, start_block=0, skipped=()):
    """Train block by block; return the losses of each block."""
    hold_weights(student, block_plan.dtype)
    reports = {}

    def prepare(number, block):
        if number in skipped:
            return [], None
        parts = choose_trainable(
            block,
            kinds=("mlp", "attention"),
            parts=("weights", "scales"),
            weight_of=lambda name: teacher.model.layers[number].get_submodule(name).weight,
        )
        layers = list(quantized_layers(block).values())
        return layers, make_optimizer(parts, dict.fromkeys(parts, 2e-3), 0.0)

    def finish(number, losses):
        reports[number] = losses
        student.model.layers[number].requires_grad_(False)

    train_blockwise(
        student,
        Teacher(teacher),
        lambda: iter(token_ids().split(4)),
        NUM_SEQUENCES,
        block_plan,
        prepare=prepare,
        finish=finish,
        start_block=start_block,
    )
    return reports


def distance(student, teacher):
    """Return the KL from the teacher on the training sequences."""
    ids = token_ids()
    mask = torch.ones(NUM_SEQUENCES, LENGTH - 1, dtype=torch.bool)
    signal = dense_signal(teacher(ids).logits[:, :-1], mask)
    return evaluate_batches(student, [(ids, signal)], description="test")["kl_nats"]


@pytest.mark.recipe
@pytest.mark.parametrize("family", TINY_MODELS)
def test_blocks_come_nearer_to_the_teachers(tmp_path, family):
    """Each block's loss falls, in order, and so does the distance of the whole; no file is left."""
    teacher, student = TINY_MODELS[family](), tiny_student(family)
    before = distance(student, teacher)
    reports = train(student, teacher, plan(tmp_path))
    assert list(reports) == [0, 1]
    for losses in reports.values():
        assert losses["block/last_loss"] < losses["block/first_loss"]
    assert distance(student, teacher) < before
    assert list(tmp_path.iterdir()) == []


def test_a_block_without_anything_to_train_is_passed_through(tmp_path):
    """It counts as finished, and the next one learns from what it gives."""
    teacher, student = TINY_MODELS["llama"](), tiny_student()
    reports = train(student, teacher, plan(tmp_path), skipped=(0,))
    assert list(reports) == [0, 1]
    assert reports[0] == {}
    assert reports[1]["block/last_loss"] < reports[1]["block/first_loss"]


@pytest.mark.parametrize("family", TINY_MODELS)
def test_targets_of_packed_documents_are_as_if_alone(tmp_path, family):
    """The teacher's blocks, run one by one, end where its own pass ends on each document."""
    teacher, ids = TINY_MODELS[family](), token_ids()
    documents = torch.tensor([[number, number + 1] for number in range(NUM_SEQUENCES)])
    documents = documents.repeat_interleave(LENGTH // 2, dim=1)
    batches = [Tokens(*pair) for pair in zip(ids.split(4), documents.split(4), strict=True)]
    block_plan = plan(tmp_path)
    path = tmp_path / "states.bin"
    states = start_states(teacher, iter(batches), path, torch.float32, NUM_SEQUENCES)
    for number, block in enumerate(teacher.model.layers):
        call_of = calls_of(teacher, number, ids[:4], documents)
        advance(block, states, call_of, block_plan, torch.device("cpu"))
    expected = hidden_states(teacher, ids, documents)
    torch.testing.assert_close(teacher.model.norm(states.values), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, hidden_states(teacher, ids), atol=1e-3)


@pytest.mark.recipe
def test_a_stage_can_begin_at_any_block(tmp_path):
    """What an earlier process finished is passed through: the rest is the same to the bit."""
    teacher, student = TINY_MODELS["llama"](), tiny_student()
    other = copy.deepcopy(student)
    train(student, teacher, plan(tmp_path))
    other.model.layers[0] = copy.deepcopy(student.model.layers[0])
    assert list(train(other, teacher, plan(tmp_path), start_block=1)) == [1]
    for left, right in zip(student.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_loss_is_relative_to_each_positions_size():
    """A first token a thousand times larger than the others does not rule."""
    target = torch.randn(2, 3, 4)
    target[:, 0] *= 1000
    assert block_loss(target * 1.1, target).item() == pytest.approx(0.01, rel=1e-4)
    assert block_loss(target, target) == 0


def test_hidden_states_lie_in_a_file(tmp_path):
    """Mapped, written in place, removed in the end."""
    states = HiddenStates(tmp_path / "x" / "states.bin", (3, 4, 5), torch.bfloat16)
    states.values[1] = 2.0
    assert (tmp_path / "x" / "states.bin").stat().st_size == 3 * 4 * 5 * 2
    again = torch.from_file(
        str(tmp_path / "x" / "states.bin"), shared=True, size=60, dtype=torch.bfloat16
    )
    assert again.sum() == 2.0 * 20
    states.remove()
    assert list((tmp_path / "x").iterdir()) == []


def test_space_for_hidden_states_is_reserved_at_once(tmp_path):
    """A mapped file without space killed the process when it was written to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="File too large|No space left"):
            HiddenStates(tmp_path / "states.bin", (100, 100, 100), torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
