import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qat.model.layers import FakeQuantLinear
from qat.model.surgery import (
    current_indices,
    dense_weights,
    freeze_indices,
    hold_weights,
    layers_of_kind,
    model_tensors,
    quantized_layers,
    release_weights,
    thaw_indices,
)
from qat.quant.fit import fit_weight
from qat.quant.plan import TensorInfo, parse_plan
from qat.quant.spec import make_spec
from tests.tiny import FAMILY_TIED, TINY_MODELS, plan_of, tiny_student

TOKEN_IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", TINY_MODELS)
def test_seven_linears_a_layer_are_quantized_and_the_head_is_not(family, tied):
    """By type and role, in the model's order; tied or not, embedding and head stay dense."""
    model = TINY_MODELS[family](tied=tied)
    linears = dense_weights(model, plan_of(model))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [name.rpartition(".")[2] for name in linears] == names * 2
    student = tiny_student(family, tied=tied)
    assert list(quantized_layers(student)) == list(linears)
    assert isinstance(student.lm_head, nn.Linear)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    assert len(layers_of_kind(student, "mlp")) == 6
    assert len(layers_of_kind(student, "attention")) == 8


@pytest.mark.parametrize("family", TINY_MODELS)
def test_more_bits_are_nearer_to_the_model(family):
    """Surgery itself changes nothing but the weights: the logits follow the bits."""
    wanted = TINY_MODELS[family]()(TOKEN_IDS).logits
    errors = [
        float((tiny_student(family, plan)(TOKEN_IDS).logits - wanted).norm() / wanted.norm())
        for plan in ("q2_int", "q4_int", "q6_int")
    ]
    assert errors[2] < 0.1
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("family", "tied"), FAMILY_TIED)
def test_every_parameter_is_named_once(family, tied):
    """Tied ones under one name; a student has the tensors of its model, in the same order."""
    model = TINY_MODELS[family](tied=tied)
    found = model_tensors(model)
    assert list(found) == [name for name, _ in model.named_parameters()]
    aliases = found["model.embed_tokens.weight"].aliases
    assert aliases == (("lm_head.weight",) if tied else ())
    for plan in ("q2a4", "q2a4, embed=int4-g32", "all=int4-g32"):
        assert model_tensors(tiny_student(family, plan, tied=tied)) == found


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_a_model_without_known_linears_is_refused(kind):
    """Instead of a run that trains nothing."""
    tensors = {"0.weight": TensorInfo(shape=(4, 4), is_quantizable=True)}
    with pytest.raises(ValueError, match=f"no {kind} linear named .*proj.*not supported"):
        parse_plan(f"{kind}=int4-row").resolve(tensors)


def test_a_plan_that_quantizes_nothing_is_refused():
    """A model left as it was has nothing to train."""
    model = TINY_MODELS["llama"]()
    plan = plan_of(model, "all=f16")
    with pytest.raises(ValueError, match="all=f16 quantizes no weight; name a preset such as q4a4"):
        dense_weights(model, plan)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("q4_g48", r"lut4-g48 does not fit model\.layers\.0.*: group size 48 does not divide"),
        ("q4_r33", r"lut4-r33 does not fit model\.layers\.0.*k_proj: rank 33 exceeds .*at most 32"),
    ],
)
def test_a_plan_that_does_not_fit_names_the_layer(plan, message):
    """And says which number would do."""
    with pytest.raises(ValueError, match=message):
        plan_of(TINY_MODELS["llama"](), plan)


def make_layer(bits, kind, seed):
    """Return a layer, its weight, and codebook values in no order, as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(9, 16, generator=generator) * torch.randn(9, 1, generator=generator).exp()
    spec = make_spec(bits=bits, **kind)
    linear = nn.Linear(16, 9, bias=False)
    layer = FakeQuantLinear.from_linear(linear, fit_weight(weight, spec))
    order = torch.randperm(2**bits, generator=generator)
    if spec.has_offset:
        return layer.requires_grad_(False), weight, generator  # its codebook never moves
    layer.codebook.data = layer.codebook.data[order]
    layer.indices = order.argsort().to(torch.uint8)[layer.indices.int()]
    return layer.requires_grad_(False), weight, generator


kinds = st.sampled_from(
    [
        {"group_size": 8},
        {"group_size": 0},
        {"rank": 2},
        {"group_size": 8, "codebook": "int"},
        {"group_size": 8, "codebook": "uint"},
    ]
)


@pytest.mark.recipe
@settings(max_examples=30, deadline=None)
@given(
    bits=st.integers(2, 4),
    kind=kinds,
    seed=st.integers(0, 999),
    source=st.sampled_from(["none", "weight", "other weight"]),
)
def test_thawing_and_freezing_change_no_bit(bits, kind, seed, source):
    """Training starts from exactly the stored student, whatever it is told the weight was."""
    layer, weight, generator = make_layer(bits, kind, seed)
    before = layer.fake_quantized_weight()
    values = layer.codebook[layer.indices.long()]
    given_weight = {
        "none": None,
        "weight": weight,
        "other weight": 10 * torch.randn(9, 16, generator=generator),
    }[source]
    thaw_indices(layer, given_weight)
    assert torch.isfinite(layer.latent_weight).all()
    assert torch.equal(layer.fake_quantized_weight(), before)
    assert not layer.indices.numel()  # they take no memory while they follow from the weight
    assert torch.equal(layer.codebook[current_indices(layer).long()], values)
    freeze_indices(layer)
    assert layer.latent_weight is None
    assert torch.equal(layer.fake_quantized_weight(), before)
    assert torch.equal(layer.codebook[layer.indices.long()], values)


def test_a_thawed_layer_remembers_its_weight():
    """Weights near a border stay near it: most latent values are the full-precision ones."""
    layer, weight, _ = make_layer(4, {"group_size": 8}, seed=1)
    thaw_indices(layer, weight)
    assert ((layer.latent_weight - weight).abs() < 1e-6).float().mean() > 0.9


def test_latent_weights_that_moved_are_frozen_where_they_are():
    """What the last forward used is what the file holds."""
    layer, weight, generator = make_layer(3, {"group_size": 8}, seed=2)
    thaw_indices(layer, weight)
    layer.latent_weight.data += torch.randn(9, 16, generator=generator)
    layer.codebook.data += 0.05 * torch.randn(8, generator=generator)
    used = layer.fake_quantized_weight()
    freeze_indices(layer)
    assert torch.equal(layer.fake_quantized_weight(), used)
    freeze_indices(layer)  # a second time does nothing
    assert torch.equal(layer.fake_quantized_weight(), used)


def test_held_weights_are_the_weights():
    """Formed once for many forwards: the same logits, in the dtype asked for, then let go."""
    student = tiny_student()
    wanted = student(TOKEN_IDS).logits
    hold_weights(student, torch.float32)
    assert torch.equal(student(TOKEN_IDS).logits, wanted)
    hold_weights(student, torch.bfloat16)
    layers = quantized_layers(student).values()
    assert all(layer.held_weight.dtype == torch.bfloat16 for layer in layers)
    release_weights(student)
    assert all(layer.held_weight is None for layer in layers)
    assert torch.equal(student(TOKEN_IDS).logits, wanted)
