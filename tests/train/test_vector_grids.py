"""Training on vector grids: gradients, thawing and freezing, files, falling losses."""

import pytest
import torch

from qat.distill.kl import forward_kl
from qat.distill.teacher import top_k_signal
from qat.grids.blocks import BLOCK_TYPES
from qat.model.checkpoint import read_checkpoint, student_tensors
from qat.model.layers import FakeQuantLinear
from qat.model.surgery import (
    freeze_indices,
    hold_weights,
    quantized_layers,
    quantized_tensor,
    thaw_indices,
)
from qat.quant.fit import fit_weight
from qat.quant.hessian import fit_with_hessian
from qat.quant.spec import FORMATS, SUPER_SCALES
from qat.train.step import Batch, Trainer, form_weights, pull_gradients
from qat.train.trainable import choose_trainable, make_optimizer, trained_layers
from tests.tiny import others_later, save_student, save_tiny, tiny_llama, tiny_student

SPEC = FORMATS["gguf:iq2_s"]
SPECS = [FORMATS[f"gguf:{kind}"] for kind in SUPER_SCALES]
PLAN = (
    "linears=gguf:q4_0, *.down_proj=gguf:iq2_s, *.up_proj=gguf:iq2_xxs, *.q_proj=gguf:iq2_xs, "
    "*.o_proj=gguf:iq3_xxs, *.v_proj=gguf:iq3_s"
)
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "head_dim": 64,
    "num_hidden_layers": 1,
}
PARTS = ("super_scale", "sub_scale")

each_spec = pytest.mark.parametrize("spec", others_later(SPECS), ids=lambda spec: spec.name)


def some_layer(spec, *, is_thawed):
    """Return a layer whose sub-scales lie between integers, and some outside their range."""
    weight = torch.randn(6, 512) * 0.1
    layer = FakeQuantLinear(512, 6, spec)
    layer.take(fit_weight(weight, spec))
    if is_thawed:
        thaw_indices(layer, weight)
        layer.latent_weight.data *= 1.5  # some weights beyond the outer points
    layer.sub_scale.data += torch.rand_like(layer.sub_scale) * 2 - 1
    return layer


def plain_weight(layer, parts, latent):
    """Return W_hat by autograd alone: rounding is detached, the range a mask."""
    grid, form = layer.spec.grid, layer.spec.scale
    d = parts["super_scale"]
    d = d + (d.half().float() - d).detach()
    s = parts["sub_scale"].clamp(0, 15)
    s = s + (s.round() - s).detach()
    full = d.repeat_interleave(256 // form.sub_block, dim=1)
    scale = (full * (0.5 + s) * form.factor).repeat_interleave(form.sub_block, dim=1)
    if latent is None:
        return grid.look_up(layer.indices) * scale
    normalized = latent / scale
    nearest = grid.nearest(normalized.detach())
    inside = normalized.detach().abs() <= grid.table.reach
    values = torch.where(inside, normalized + (nearest - normalized).detach(), nearest)
    return values * scale


@each_spec
@pytest.mark.parametrize("is_thawed", [True, False])
def test_gradients_are_those_of_autograd(spec, is_thawed):
    """Of the latent weight, super-scales and sub-scales; held weights give the same."""
    layer = some_layer(spec, is_thawed=is_thawed)
    arriving = torch.randn(6, 512)
    parts = {name: getattr(layer, name).detach().clone().requires_grad_() for name in PARTS}
    latent = layer.latent_weight.detach().clone().requires_grad_() if is_thawed else None
    expected = plain_weight(layer, parts, latent)
    expected.backward(arriving)
    found = layer.fake_quantized_weight()
    assert torch.allclose(found, expected, rtol=1e-6)
    found.backward(arriving)

    def check():
        for name in PARTS:
            gradient, wanted = getattr(layer, name).grad, parts[name].grad
            assert torch.allclose(gradient, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max())
        if is_thawed:
            assert torch.allclose(layer.latent_weight.grad, latent.grad, rtol=1e-4, atol=1e-6)
            assert 0 < (latent.grad == 0).float().mean() < 0.5

    check()
    layer.zero_grad()
    form_weights([layer], torch.float32)
    layer.held_weight.grad = arriving.clone()
    pull_gradients([layer])
    check()


@each_spec
@pytest.mark.parametrize("knows_weight", [True, False])
def test_thaw_and_freeze_keep_the_weights(spec, knows_weight):
    """Also of indices that error feedback moved to other points."""
    weight = torch.randn(6, 256) * 0.1
    x = torch.randn(512, 256) @ torch.randn(256, 256) / 20
    layer = FakeQuantLinear(256, 6, spec)
    layer.take(fit_with_hessian(weight, spec, x.T @ x / 512))
    before, indices = layer.fake_quantized_weight(), layer.indices.clone()
    thaw_indices(layer, weight if knows_weight else None)
    assert torch.equal(layer.fake_quantized_weight(), before)
    freeze_indices(layer)
    assert layer.latent_weight is None
    assert torch.equal(layer.indices, indices)
    assert torch.equal(layer.fake_quantized_weight(), before)


@pytest.mark.recipe
def test_checkpoints_hold_what_trains_and_no_more(tmp_path):
    """The same weights, and the bytes of the type for 256 of them."""
    student = tiny_student("llama", PLAN, **SIZES)
    layers = {n: m for n, m in quantized_layers(student).items() if m.spec in SPECS}
    assert {layer.spec for layer in layers.values()} == set(SPECS)
    for layer in layers.values():
        thaw_indices(layer)
        layer.sub_scale.data += torch.randn_like(layer.sub_scale)
    tensors = student_tensors(student)
    for name, layer in layers.items():
        sizes = [t.numel() * t.element_size() for k, t in tensors.items() if k.startswith(name)]
        shape, num_bytes = layer.weight.shape, BLOCK_TYPES[layer.spec.grid.kind].num_bytes
        assert sum(sizes) == layer.spec.size_bytes(shape) == shape.numel() // 256 * num_bytes
    text_source = save_tiny(tmp_path / "base", tiny_llama())
    save_student(tmp_path / "student", student, text_source, PLAN)
    found, _ = read_checkpoint(tmp_path / "student")
    for name, layer in quantized_layers(student).items():
        read = found.get_submodule(name)
        assert torch.equal(read.fake_quantized_weight(), layer.fake_quantized_weight()), name
        if layer.spec in SPECS:
            assert torch.equal(quantized_tensor(layer).dequantize(), read.fake_quantized_weight())


def make_trainer(student, rates):
    """Return what trains the linears of a student's MLP, and a batch."""
    model = tiny_llama(**SIZES)
    token_ids = torch.randint(261, (4, 12), generator=torch.Generator().manual_seed(0))
    teacher = model(token_ids).logits[:, :-1]
    mask = torch.ones(4, 11, dtype=torch.bool)
    batch = Batch.of(token_ids, top_k_signal(teacher, mask, 12))
    chosen = choose_trainable(
        student,
        kinds=("mlp",),
        parts=tuple(rates),
        weight_of=lambda name: model.get_submodule(name).weight,
    )
    hold_weights(student, torch.float32)
    trainer = Trainer(
        model=student,
        layers=trained_layers(student),
        optimizer=make_optimizer(chosen, rates),
        divergence=forward_kl,
        dtype=torch.float32,
        clip_grad_norm=0.0,
        sync=lambda: None,
    )
    return trainer, batch


def test_scales_that_training_lost_come_back():
    """Sub-scales into their range, super-scales above zero."""
    student = tiny_student("llama", PLAN, **SIZES)
    trainer, batch = make_trainer(student, {"scales": 1e-4})
    layer = next(m for m in quantized_layers(student).values() if m.spec == SPEC)
    layer.sub_scale.data[0, 0], layer.super_scale.data[1, 0] = 99.0, -1.0
    trainer.step([batch], 1.0)
    assert layer.sub_scale[0, 0] == 15
    assert layer.super_scale[1, 0] > 0
    assert torch.isfinite(layer.fake_quantized_weight()).all()


@pytest.mark.recipe
@pytest.mark.parametrize("kind", others_later(["iq2_s", "iq2_xxs"]))
@pytest.mark.parametrize("rates", [{"weights": 1e-3, "scales": 1e-5}, {"scales": 1e-4}])
def test_steps_lower_the_loss(kind, rates):
    """Weights and scales together, and scales of frozen points alone: by half in 12 steps."""
    student = tiny_student("llama", f"*.down_proj=gguf:{kind}", **SIZES)
    trainer, batch = make_trainer(student, rates)
    losses = [float(trainer.step([batch], 1.0)[0]) for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]
