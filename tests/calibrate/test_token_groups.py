"""Rows of a head in groups: which tokens come together, and what their H counts."""

import pytest
import torch

from qat.calibrate.statistics import Fed
from qat.calibrate.token_groups import TOKENS_A_GROUP, group_tokens
from qat.pipelines.fit_layers import FitTask, OutputGrams
from qat.quant.drift import Correction, Moments
from qat.quant.spec import TensorSpec
from qat.runtime import distributed
from qat.runtime.device import Device
from tests.processes import forked

D = 64
HALF = TOKENS_A_GROUP


@pytest.fixture
def head():
    """A head of two kinds of tokens, each likely after states in a subspace of its own."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.3 * torch.randn(2 * HALF, D, generator=generator)
    states = []
    for rows in (weight[:HALF], weight[HALF:]):
        subspace = torch.randn(8, D, generator=generator) / 8**0.5
        states.append(0.5 * torch.randn(512, 8, generator=generator) @ subspace + subspace[0])
        rows += subspace[0]
    return weight, torch.cat(states)


@pytest.mark.recipe
def test_tokens_that_are_likely_after_alike_states_come_together(head):
    """All tokens, each once; a group's H is half that of the states after which they are likely."""
    weight, states = head
    found = group_tokens(lambda x: x @ weight.T, Fed(states, states))
    assert sorted(torch.cat(found.groups).tolist()) == list(range(2 * HALF))
    kinds = [set((tokens >= HALF).tolist()) for tokens in found.groups]
    assert sorted(map(list, kinds)) == [[False], [True]]
    chosen = (states @ weight.T).softmax(-1)
    whole = states.T @ states / len(states)
    for place, tokens in enumerate(found.groups):
        counts = (chosen * (1 - chosen))[:, tokens].sum(1)
        own = (states.T * counts) @ states / counts.sum()
        torch.testing.assert_close(found.hessian(place, whole), (own + whole) / 2)


@pytest.mark.recipe
def test_processes_find_the_groups_of_one(head):
    """Each has states of its own; a group's H is that of all."""
    weight, states = head
    whole = states.T @ states / len(states)

    def found():
        with distributed.joined(Device.detect("cpu")):
            own = distributed.share(states)
            groups = group_tokens(lambda x: x @ weight.T, Fed(own, own))
            places = range(len(groups.groups))
            tokens = [tokens.tolist() for tokens in groups.groups]
            return tokens, [groups.hessian(place, whole).tolist() for place in places]

    alone, hessians = found()
    for tokens, others in forked(2, found):
        assert tokens == alone
        torch.testing.assert_close(torch.tensor(others), torch.tensor(hessians))


@pytest.mark.parametrize(("num_states", "num_tokens"), [(511, 2 * HALF), (1024, 2 * HALF - 1)])
def test_few_states_or_tokens_make_no_groups(head, num_states, num_tokens):
    """One H serves then."""
    weight, states = head
    weight, states = weight[:num_tokens], states[:num_states]
    assert group_tokens(lambda x: x @ weight.T, Fed(states, states)) is None


def test_rows_in_groups_change_the_logits_less(head):
    """Half the sum of p (1 - p) (d x)^2, which one H for all rows leaves higher."""
    weight, states = head
    task = FitTask(
        specs={"lm_head": TensorSpec.from_name("gguf:q4_0")},
        weight_of=lambda _name: weight,
        grams=OutputGrams(runs={"model.layers.0.mlp.up_proj": [torch.eye(4)]}),
    )
    assert task.takes_groups("lm_head")
    moments = Moments(hessian=states.T @ states / len(states), drift=torch.zeros(D, D))
    correction = Correction(ridge=0.1, share=0.0)
    groups = group_tokens(lambda x: x @ weight.T, Fed(states, states))
    chosen = (states @ weight.T).softmax(-1)

    def cost(fitted):
        moved = states @ (fitted.dequantize() - weight).T
        return float((chosen * (1 - chosen) * moved.square()).sum())

    one = task.fit_against(["lm_head"], moments, {"lm_head": correction})["lm_head"]
    several = task.fit_in_groups("lm_head", moments, correction, None, groups)
    assert several.indices.shape == weight.shape
    assert cost(several) < 0.9 * cost(one)
