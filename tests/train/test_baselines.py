"""The steps that ours is measured against: the same work, the same layers, the same start."""

import pytest
import torch

from qat.distill.teacher import top_k_signal
from qat.model.layers import FakeQuantLinear
from qat.model.rankwise import RankwiseLinear
from qat.model.surgery import quantized_layers
from qat.quant.plan import tensor_kind
from qat.train.baselines import PlainLinear, make_case, plan_of, round_linears
from qat.train.step import Batch
from tests.tiny import tiny_llama

CASES = ("plain", "fake-quant", "rank-by-rank", "formed")
TOKEN_IDS = torch.arange(12).view(2, 6)


def trainer_of(case):
    return make_case(case, tiny_llama(), torch.float32, lambda: None)


def batch():
    logits = tiny_llama(seed=1)(TOKEN_IDS).logits[:, :-1]
    return Batch.of(TOKEN_IDS, top_k_signal(logits, torch.ones(2, 5, dtype=torch.bool), 8))


@pytest.mark.parametrize("case", CASES)
def test_a_step_moves_mlp_layers_and_nothing_else(case):
    """Master weights, or weights and scales, or low-rank factors: what the case says."""
    trainer = trainer_of(case)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    loss = float(trainer.step([batch()], 1.0)[0])
    assert 0 < loss < float("inf")
    after = trainer.model.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved
    assert all(tensor_kind(name.rpartition(".")[0]) == "mlp" for name in moved), moved
    kind = {"plain": PlainLinear, "rank-by-rank": RankwiseLinear}.get(case, FakeQuantLinear)
    assert isinstance(trainer.model.model.layers[0].mlp.up_proj, kind)


def test_both_forms_of_low_rank_scales_begin_with_the_same_loss():
    """Rank by rank and formed at once are one model."""
    losses = [float(trainer_of(case).step([batch()], 0.0)[0]) for case in CASES[2:]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("is_low_rank", [False, True])
def test_a_rounded_model_is_a_student_of_the_plan(is_low_rank):
    """Even values, and logits of the size of the model's."""
    model = tiny_llama()
    expected = model(TOKEN_IDS).logits
    plan = plan_of(model, is_low_rank=is_low_rank)
    round_linears(model, plan)
    layers = quantized_layers(model)
    assert {name: layer.spec for name, layer in layers.items()} == plan.quantized
    for name, layer in layers.items():
        steps = layer.codebook.diff()
        assert torch.allclose(steps, steps[0].expand_as(steps)), name
        assert bool(layer.spec.rank) == is_low_rank
    with torch.no_grad():
        assert 0.3 < float(model(TOKEN_IDS).logits.norm() / expected.norm()) < 3
