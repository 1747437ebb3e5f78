import copy

import pytest
import torch
from torch import nn

from qat.calibrate.decoder_layers import walk_decoder_layers
from qat.calibrate.statistics import collect_second_moments
from qat.model.head import Tokens
from qat.model.surgery import dense_weights
from tests.tiny import TINY_MODELS, plan_of, tiny_llama


def linears_of(model):
    """Return the decoder linears of a model by name."""
    return dense_weights(model, plan_of(model))


def batches(sizes=((3, 7), (2, 5))):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(261, size, generator=generator) for size in sizes]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", TINY_MODELS)
def test_moments_are_mean_squares_of_the_inputs(family, tied):
    """Over every token of every batch, by keeping all inputs and squaring them in float64."""
    model = TINY_MODELS[family](tied=tied)
    linears = linears_of(model)
    found = collect_second_moments(model, linears, batches())
    kept = {name: [] for name in linears}
    handles = [
        linear.register_forward_pre_hook(
            lambda _module, inputs, name=name: kept[name].append(inputs[0].flatten(0, 1))
        )
        for name, linear in linears.items()
    ]
    for token_ids in batches():
        model(token_ids)
    for handle in handles:
        handle.remove()
    assert list(found) == list(linears)
    for name, inputs in kept.items():
        inputs = torch.cat(inputs).double()
        assert inputs.shape[0] == 3 * 7 + 2 * 5
        assert torch.allclose(found[name].double(), inputs.square().mean(0), rtol=1e-4), name


def test_linears_that_read_one_input_share_their_moments():
    """q, k and v; gate and up: equal to the bit, and equal to those of each watched alone."""
    model = tiny_llama()
    linears = linears_of(model)
    found = collect_second_moments(model, linears, batches())
    for block in range(2):
        names = [f"model.layers.{block}.self_attn.{n}_proj" for n in "qkv"]
        assert all(torch.equal(found[name], found[names[0]]) for name in names)
        alone = collect_second_moments(model, {names[1]: linears[names[1]]}, batches())
        assert torch.allclose(alone[names[1]], found[names[1]])
    down = [name for name in linears if name.endswith("down_proj")]
    assert found[down[0]].shape == (128,)


def test_how_the_tokens_are_batched_does_not_matter():
    """One batch or many: the same mean over tokens."""
    model, linears = tiny_llama(), None
    linears = linears_of(model)
    whole = batches(((6, 7),))
    found = collect_second_moments(model, linears, whole)
    split = collect_second_moments(model, linears, list(whole[0].split(2)))
    for name, moment in found.items():
        assert torch.allclose(moment, split[name], rtol=1e-5)


def test_the_model_is_left_as_it_was():
    """No hook stays, no weight moves."""
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    collect_second_moments(model, linears_of(model), batches())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_token_at_all_is_refused():
    """An empty cache calibrates nothing."""
    model = tiny_llama()
    with pytest.raises(ValueError, match="calibration has no tokens; give a cache"):
        collect_second_moments(model, linears_of(model), [])


def test_statistics_that_are_not_finite_name_the_layer():
    """Float16 overflows in some models; the remedy is another dtype."""
    model = tiny_llama()
    model.model.layers[1].input_layernorm.weight = nn.Parameter(torch.full((64,), float("inf")))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj: inputs hold NaN.*fp32"):
        collect_second_moments(model, linears_of(model), batches())
    assert not any(module._forward_pre_hooks for module in model.modules())


LENGTHS = [[5, 7], [3, 1, 8]]


def packed():
    """Two blocks of 12 tokens, and their documents alone."""
    (token_ids,) = batches([(2, 12)])
    documents = [
        [number for number, length in enumerate(lengths) for _ in range(length)]
        for lengths in LENGTHS
    ]
    alone = [
        part[None]
        for row, lengths in zip(token_ids, LENGTHS, strict=True)
        for part in row.split(lengths)
    ]
    return Tokens(token_ids, torch.tensor(documents)), alone


@pytest.mark.recipe
@pytest.mark.parametrize("family", TINY_MODELS)
def test_packed_documents_calibrate_as_if_alone(family):
    """Moments and Hessians are those of each document in a pass of its own."""
    model = TINY_MODELS[family]()
    linears = linears_of(model)
    whole, alone = packed()
    found, expected = (collect_second_moments(model, linears, x) for x in ([whole], alone))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (found, expected) = (
        {tuple(names): x.all.hessian for names, x in walk_decoder_layers(model, linears, batch)}
        for batch in ([whole], alone)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    joined = next(iter(walk_decoder_layers(model, list(linears)[-1:], [whole.token_ids])))[
        1
    ].all.hessian
    assert not torch.allclose(joined, list(found.values())[-1], atol=1e-3)
