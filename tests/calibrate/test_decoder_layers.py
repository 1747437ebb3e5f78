import pytest
import torch

from qat.calibrate.decoder_layers import walk_decoder_layers, walk_dense_layers
from tests.tiny import TINY_MODELS, plan_of, tiny_model

BATCH = torch.arange(48).view(4, 12)


@pytest.mark.parametrize("family", TINY_MODELS)
def test_statistics_are_those_of_the_inputs_really_fed(family):
    """mean x_q x_q^T and mean (x - x_q) x_q^T, with x_q behind all layers replaced so far.

    What writes into the residual stream is asked for the dense one, and counts by its size.
    """
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
    writers = [name for name in names if found[name].all.wanted is not None]
    assert len(writers) == (0 if family == "gemma" else 2 * len(dense.model.layers))
    ends = {name: stream_around(name) for name in writers}
    watched = {*names, *(module for pair in ends.values() for module in pair)}
    inputs, dense_inputs = inputs_of(model, watched, batches), inputs_of(dense, watched, batches)
    for name, statistics in found.items():
        x, moments, weights = inputs[name], statistics.all, torch.ones(72, 1)
        if name in writers:
            before, after = ends[name]
            end = dense_inputs[after]
            weights = (end.square().mean(1, keepdim=True) + 1e-6).reciprocal()
            wanted = (end - inputs[before]).T @ (weights * x) / weights.sum()
            torch.testing.assert_close(moments.wanted, wanted, atol=1e-4, rtol=1e-3)
        else:
            drift = (dense_inputs[name] - x).T @ x / len(x)
            torch.testing.assert_close(moments.drift, drift, atol=1e-4, rtol=1e-3)
        hessian = x.T @ (weights * x) / weights.sum()
        torch.testing.assert_close(moments.hessian, hessian, atol=1e-4, rtol=1e-3)


def test_a_model_that_is_not_quantized_wants_its_own_weights():
    """Whatever writes into the residual stream, biases and multipliers among it."""
    model = tiny_model("granite", residual_multiplier=0.5, attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    names = list(plan_of(model).quantized)
    for group, statistics in walk_decoder_layers(model, names, [torch.randint(0, 256, (4, 12))]):
        for name in group:
            aim = statistics.all.aim(model.get_submodule(name).weight)
            torch.testing.assert_close(aim, torch.zeros_like(aim), atol=1e-4, rtol=0)


def stream_around(name: str) -> tuple[str, str]:
    """Return the norms that read the residual stream before and after a linear adds to it."""
    layer, number = name.rsplit(".", 2)[0], int(name.split(".")[2])
    if "self_attn" in name:
        return f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"
    last = "model.norm" if number == 1 else f"model.layers.{number + 1}.input_layernorm"
    return f"{layer}.post_attention_layernorm", last


def test_linears_come_in_the_order_of_their_calls():
    """Phi-3 lists the projection of attention's output before that of its inputs."""
    model = tiny_model("phi3")
    names = list(plan_of(model).quantized)
    found = [name for group, _ in walk_decoder_layers(model, names, [BATCH]) for name in group]
    called = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    assert [name.split(".", 3)[3] for name in found[:4]] == called


def test_a_walk_that_ends_early_leaves_the_model_as_it_is():
    """No module keeps what its forward was replaced by."""
    model = TINY_MODELS["llama"]()
    walk = walk_decoder_layers(model, list(plan_of(model).quantized), [BATCH])
    for _ in range(3):
        next(walk)
    assert any("forward" in vars(module) for module in model.modules())
    walk.close()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_linear_that_is_never_called_is_told():
    """It would stay as it is without a word."""
    model = TINY_MODELS["llama"]()
    model.model.layers[0].extra = torch.nn.Linear(64, 64)
    with pytest.raises(ValueError, match="extra takes no part in the forward pass"):
        next(walk_decoder_layers(model, ["model.layers.0.extra"], [BATCH]))


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
