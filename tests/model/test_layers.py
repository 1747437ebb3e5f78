import pytest
import torch
from torch import nn
from torch.nn import functional

from qat.grids.scalar import codebook_range, expand_groups, low_rank_scale, snap_float16
from qat.model.layers import FakeQuantEmbedding, FakeQuantLinear, TiedHead
from qat.model.surgery import current_indices, thaw_indices
from qat.quant.fit import fit_weight
from qat.quant.spec import make_spec
from tests.tiny import FAMILY_TIED, TINY_MODELS, tiny_student

SPECS = {
    "group": make_spec(bits=2, group_size=8),
    "row": make_spec(bits=3, group_size=0),
    "rank": make_spec(bits=4, rank=3),
    "int": make_spec(bits=2, group_size=8, codebook="int"),
    "affine": make_spec(bits=3, group_size=8, codebook="uint"),
}


def make_layer(name, *, has_bias=True):
    """Return a linear, its fit and the quantized layer."""
    linear = nn.Linear(24, 10, bias=has_bias)
    quantized = fit_weight(linear.weight, SPECS[name])
    return linear, quantized, FakeQuantLinear.from_linear(linear, quantized)


@pytest.mark.parametrize("name", SPECS)
def test_the_layer_is_a_linear_with_the_fitted_weight(name):
    """Its weight is the fit's to the bit, its output that of torch's own linear, bias included."""
    linear, quantized, layer = make_layer(name)
    assert torch.equal(layer.fake_quantized_weight(), quantized.dequantize())
    x = torch.randn(2, 5, 24)
    expected = functional.linear(x, quantized.dequantize(), linear.bias)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("is_thawed", [False, True])
def test_gradients_are_those_of_plain_autograd(name, is_thawed):
    """Scales, magnitudes and codebook get what a dense formula with float16 parts gives them."""
    _, _, layer = make_layer(name)
    if is_thawed:
        thaw_indices(layer)
    x = torch.randn(7, 24)
    target = torch.randn(7, 10)
    ((layer(x) - target) ** 2).sum().backward()
    found = {key: p.grad for key, p in layer.named_parameters() if key not in ("bias",)}

    stored = {
        key: snap_float16(p.detach()).requires_grad_()
        for key, p in layer.named_parameters()
        if key not in ("bias", "latent_weight")
    }
    if layer.spec.rank:
        scale = low_rank_scale(stored["scale_a"], stored["magnitude"], stored["scale_b"])
    else:
        scale = expand_groups(stored["scale"], 24)
    values = stored["codebook"][current_indices(layer).long()]
    offset = expand_groups(stored["offset"], 24) if "offset" in stored else 0
    weight = scale * values + offset
    if is_thawed:
        latent = layer.latent_weight.detach().clone().requires_grad_()
        stored["latent_weight"] = latent
        normalized = (latent - offset) / scale
        low, high = codebook_range(stored["codebook"].detach())
        inside = ((normalized >= low) & (normalized <= high)).float()
        weight = scale * (values + inside * (normalized - normalized.detach())) + offset
    ((functional.linear(x, weight, layer.bias) - target) ** 2).sum().backward()
    assert found.keys() == stored.keys()
    for key, gradient in found.items():
        assert torch.allclose(gradient, stored[key].grad, rtol=1e-4, atol=1e-4), key


def test_a_held_weight_is_used_as_it_is():
    """Forming the weight is skipped, in whatever dtype it is held."""
    _, _, layer = make_layer("group", has_bias=False)
    layer.held_weight = torch.ones(10, 24, dtype=torch.bfloat16)
    x = torch.randn(3, 24).bfloat16()
    assert torch.equal(layer(x), functional.linear(x, layer.held_weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_has_the_dtype_of_the_input(dtype):
    """Parameters stay float32, compute follows x."""
    _, _, layer = make_layer("rank", has_bias=False)
    assert layer(torch.randn(3, 24).to(dtype)).dtype == dtype
    assert all(p.dtype == torch.float32 for p in layer.parameters())


def test_parts_stored_in_float32_are_not_rounded():
    """Checkpoints of other programs stay what they are."""
    linear = nn.Linear(24, 10)
    spec = make_spec(bits=2, group_size=8, stored_dtype="float32")
    layer = FakeQuantLinear.from_linear(linear, fit_weight(linear.weight, spec))
    layer.scale.data = layer.scale.data * 1.00001
    expected = layer.codebook[layer.indices.long()] * expand_groups(layer.scale, 24)
    assert torch.equal(layer.fake_quantized_weight(), expected)


def test_scales_below_the_floor_count_as_it():
    """Also negative ones, as in the seeds' first form."""
    linear = nn.Linear(24, 10)
    spec = make_spec(bits=2, group_size=8, floor=0.01)
    layer = FakeQuantLinear.from_linear(linear, fit_weight(linear.weight, spec))
    layer.scale.data[0, 0] = -3.0
    assert layer.full_scale()[0, 0].item() == pytest.approx(0.01)


def test_people_see_sizes_and_format():
    """In a printed model."""
    assert "24, 10, lut2-g8" in str(make_layer("group")[2])
    assert "24, 10, lut4-r3" in str(make_layer("rank")[2])


@pytest.mark.parametrize("spec", ["int4-g32", "lut3-g32", "affine4-g64", "lut4-r4"])
@pytest.mark.parametrize(("family", "tied"), FAMILY_TIED)
def test_a_quantized_embedding_is_the_dense_one_of_its_table(family, tied, spec):
    """Logits to the bit of the model whose embedding holds the dequantized table, head included."""
    student = tiny_student(family, f"embed={spec}", tied=tied)
    dense = TINY_MODELS[family](tied=tied)
    embedding = student.get_input_embeddings()
    assert isinstance(embedding, FakeQuantEmbedding)
    assert isinstance(student.lm_head, TiedHead if tied else nn.Linear)
    dense.get_input_embeddings().weight.data = embedding.fake_quantized_weight()
    token_ids = torch.arange(12).view(2, 6)
    assert torch.equal(student(token_ids).logits, dense(token_ids).logits)
    embedding.held_weight = embedding.fake_quantized_weight()
    assert torch.equal(student(token_ids).logits, dense(token_ids).logits)


def test_a_tied_head_trains_its_embedding():
    """Both uses send gradients to one set of scales, as with a dense tied table."""
    student, dense = tiny_student(plan="embed=int4-g32"), TINY_MODELS["llama"]()
    embedding = student.get_input_embeddings()
    thaw_indices(embedding)
    table = dense.get_input_embeddings().weight
    table.data = embedding.fake_quantized_weight().detach()
    token_ids = torch.arange(12).view(2, 6)
    for model, parameter in ((student, embedding.latent_weight), (dense, table)):
        parameter.requires_grad_()
        model(token_ids).logits.square().sum().backward()
    assert sum(p is embedding.latent_weight for p in student.parameters()) == 1
    torch.testing.assert_close(embedding.latent_weight.grad, table.grad, rtol=1e-4, atol=1e-3)
