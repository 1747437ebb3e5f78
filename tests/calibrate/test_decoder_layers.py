import pytest
import torch

from qat.calibrate.decoder_layers import walk_decoder_layers, walk_dense_layers
from tests.tiny import TINY_MODELS, plan_of


@pytest.mark.parametrize("family", TINY_MODELS)
def test_statistics_are_those_of_the_inputs_really_fed(family):
    """mean x_q x_q^T and mean (x - x_q) x_q^T, with x_q behind all layers replaced so far."""
    model, dense = TINY_MODELS[family](), TINY_MODELS[family]()
    batches = list(torch.randint(0, 256, (6, 12)).split(4))
    names = list(plan_of(model).quantized)
    found = {}
    for group, statistics in walk_decoder_layers(model, names, batches):
        for name in group:
            found[name] = statistics
            weight = model.get_submodule(name).weight
            weight.data = (weight.data * 8).round() / 8
    assert list(found) == names
    inputs, dense_inputs = inputs_of(model, names, batches), inputs_of(dense, names, batches)
    for name, statistics in found.items():
        x, expected = inputs[name], dense_inputs[name]
        torch.testing.assert_close(statistics.hessian, x.T @ x / len(x), atol=1e-4, rtol=1e-3)
        drift = (expected - x).T @ x / len(x)
        torch.testing.assert_close(statistics.drift, drift, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", TINY_MODELS)
def test_a_dense_walk_gives_second_moments_and_changes_nothing(family):
    """mean x x^T of every linear and of the head, in a model that stays as it is."""
    model = TINY_MODELS[family]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = list(torch.randint(0, 256, (6, 12)).split(4))
    names = list(plan_of(model).quantized)
    found = {}
    for group, moment in walk_dense_layers(model, names, batches, head="lm_head"):
        found |= dict.fromkeys(group, moment)
    assert list(found) == [*names, "lm_head"]
    for name, x in inputs_of(model, [*names, "lm_head"], batches).items():
        torch.testing.assert_close(found[name], x.T @ x / len(x), atol=1e-4, rtol=1e-3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def inputs_of(model, names, batches) -> dict[str, torch.Tensor]:
    """Return every linear's inputs, (tokens, I), from plain whole forward passes."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: seen[name].append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    for batch in batches:
        model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_a_linear_outside_numbered_blocks_is_refused():
    """The walk needs blocks that follow each other; it says which fit does not."""
    model = TINY_MODELS["llama"]()
    with pytest.raises(ValueError, match="--fit moments"):
        next(walk_decoder_layers(model, ["lm_head"], [torch.zeros(1, 4, dtype=torch.long)]))
    with pytest.raises(ValueError, match="no tokens"):
        next(walk_decoder_layers(model, ["model.layers.0.mlp.up_proj"], []))
