"""Training on K-types and IQ4_XS: gradients, thawing and freezing, files, falling losses."""

import pytest
import torch

from qat.distill.kl import forward_kl
from qat.distill.teacher import top_k_signal
from qat.model.checkpoint import read_checkpoint, student_tensors
from qat.model.layers import FakeQuantLinear
from qat.model.surgery import (
    freeze_indices,
    hold_weights,
    quantized_layers,
    thaw_indices,
)
from qat.quant.fit import fit_weight
from qat.quant.hessian import fit_with_hessian
from qat.quant.spec import FORMATS, K_FORMATS
from qat.train.step import Batch, Trainer, form_weights, pull_gradients
from qat.train.trainable import choose_trainable, make_optimizer, trained_layers
from tests.tiny import others_later, save_student, save_tiny, tiny_llama, tiny_student

SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
LAYERS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def some_layer(name, *, is_thawed):
    """Return a layer whose integers lie between integers, and some outside their range."""
    weight, spec = torch.randn(6, 512) * 0.1, FORMATS[f"gguf:{name}"]
    layer = FakeQuantLinear(512, 6, spec)
    layer.take(fit_weight(weight, spec, num_rounds=1))
    if is_thawed:
        thaw_indices(layer, weight)
        layer.latent_weight.data *= 1.3  # some weights beyond the outer values
    for part in spec.scale.integer_bits:
        getattr(layer, part).data += torch.rand_like(getattr(layer, part)) * 2 - 1
    layer.codebook.requires_grad_(False)
    return layer


def plain_weight(layer, parts, latent):
    """Return W_hat by autograd alone: rounding is detached, the range a mask."""
    form = layer.spec.scale

    def integers(name):
        inside = parts[name].clamp(0, form.top)
        return inside + (inside.round() - inside).detach()

    def snapped(name):
        d = parts[name] + (parts[name].half().float() - parts[name]).detach()
        return d.repeat_interleave(form.per_super, dim=1)

    scale = snapped("super_scale") * (integers("sub_scale") + form.shift)
    scale, offset = scale.repeat_interleave(form.sub_block, dim=1), 0
    if form.has_offset:
        offset = -(snapped("super_offset") * integers("sub_offset"))
        offset = offset.repeat_interleave(form.sub_block, dim=1)
    codebook = layer.codebook
    if latent is None:
        return scale * codebook[layer.indices.int()] + offset
    normalized = (latent - offset) / scale
    nearest = codebook[(normalized.detach().unsqueeze(-1) - codebook).abs().argmin(-1)]
    low = codebook[0] - (codebook[1] - codebook[0]) / 2
    high = codebook[-1] + (codebook[-1] - codebook[-2]) / 2
    inside = (normalized.detach() >= low) & (normalized.detach() <= high)
    values = torch.where(inside, normalized + (nearest - normalized).detach(), nearest)
    return scale * values + offset


@pytest.mark.parametrize("is_thawed", [True, False])
@pytest.mark.parametrize("name", others_later(K_FORMATS))
def test_gradients_are_those_of_autograd(name, is_thawed):
    """Of the latent weight and all parts; held weights give the same."""
    layer = some_layer(name, is_thawed=is_thawed)
    names = [part for part in layer.parts if part != "codebook"]
    arriving = torch.randn(6, 512)
    parts = {part: getattr(layer, part).detach().clone().requires_grad_() for part in names}
    latent = layer.latent_weight.detach().clone().requires_grad_() if is_thawed else None
    expected = plain_weight(layer, parts, latent)
    expected.backward(arriving)
    found = layer.fake_quantized_weight()
    differs = (found - expected).abs() > 1e-6 * expected.abs().amax()
    assert differs.float().mean() < 1e-3  # ties between values
    found.backward(arriving)

    def check():
        for part in names:
            gradient, wanted = getattr(layer, part).grad, parts[part].grad
            assert torch.allclose(gradient, wanted, rtol=1e-2, atol=1e-2 * wanted.abs().max()), part
        if is_thawed:
            assert torch.allclose(layer.latent_weight.grad, latent.grad, rtol=1e-4, atol=1e-6)
            assert 0 < (latent.grad == 0).float().mean() < 0.5

    check()
    layer.zero_grad()
    form_weights([layer], torch.float32)
    layer.held_weight.grad = arriving.clone()
    pull_gradients([layer])
    check()


@pytest.mark.parametrize("knows_weight", [True, False])
@pytest.mark.parametrize("name", others_later(K_FORMATS))
def test_thaw_and_freeze_keep_the_weights(name, knows_weight):
    """Also of indices that error feedback moved to other values, and of scales that are zero."""
    weight, spec = torch.randn(6, 512) * 0.1, FORMATS[f"gguf:{name}"]
    x = torch.randn(1024, 512) @ torch.randn(512, 512) / 20
    layer = FakeQuantLinear(512, 6, spec)
    layer.take(fit_with_hessian(weight, spec, x.T @ x / 1024))
    layer.sub_scale.data[0, 0] = -spec.scale.shift
    before = layer.fake_quantized_weight()
    thaw_indices(layer, weight if knows_weight else None)
    assert torch.equal(layer.fake_quantized_weight(), before)
    freeze_indices(layer)
    assert layer.latent_weight is None
    assert torch.equal(layer.fake_quantized_weight(), before)


def test_checkpoints_hold_what_trains(tmp_path):
    """The same weights; the bytes of each type's blocks and its fixed codebook."""
    rules = [f"*.{layer}=gguf:{name}" for layer, name in zip(LAYERS, K_FORMATS, strict=True)]
    plan = ", ".join(["linears=gguf:q4_0", *rules])
    student = tiny_student("llama", plan, **SIZES, num_hidden_layers=1)
    for layer in quantized_layers(student).values():
        thaw_indices(layer)
        for part in layer.spec.scale.integer_bits:
            getattr(layer, part).data += torch.randn_like(getattr(layer, part))
    tensors = student_tensors(student)
    text_source = save_tiny(tmp_path / "base", tiny_llama())
    save_student(tmp_path / "student", student, text_source, plan)
    found, _ = read_checkpoint(tmp_path / "student")
    for name, layer in quantized_layers(student).items():
        read = found.get_submodule(name)
        assert torch.equal(read.fake_quantized_weight(), layer.fake_quantized_weight())
        held = sum(tensor.nbytes for key, tensor in tensors.items() if key.startswith(name))
        shape = (layer.out_features, layer.in_features)
        assert held == layer.spec.size_bytes(shape) + 2 * layer.spec.grid.num_values


@pytest.mark.recipe
@pytest.mark.parametrize("name", others_later(["q2_k", "q3_k"]))
def test_steps_lower_the_loss(name):
    """Weights and scales together, by half in 12 steps."""
    rates = {"weights": 1e-3, "scales": 1e-6}
    student = tiny_student("llama", f"*.down_proj=gguf:{name}", **SIZES)
    model = tiny_llama(**SIZES)
    token_ids = torch.randint(261, (4, 12), generator=torch.Generator().manual_seed(0))
    teacher = model(token_ids).logits[:, :-1]
    batch = Batch.of(token_ids, top_k_signal(teacher, torch.ones(4, 11, dtype=torch.bool), 12))
    chosen = choose_trainable(
        student,
        kinds=("mlp",),
        parts=tuple(rates),
        weight_of=lambda layer: model.get_submodule(layer).weight,
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
    losses = [float(trainer.step([batch], 1.0)[0]) for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]
