"""A quantized embedding trains, and a head that is tied to it adds its gradient."""

import copy

import pytest
import torch

from qat.distill.kl import forward_kl
from qat.distill.teacher import dense_signal
from qat.model.surgery import layers_of_kind, quantized_layers
from qat.train.step import Batch, Trainer, form_weights, pull_gradients
from qat.train.trainable import choose_trainable, make_optimizer, trained_layers
from tests.tiny import FAMILY_TIED, TINY_MODELS, VOCAB_SIZE, quantize_plainly

IDS = torch.arange(3 * 12).view(3, 12) * 7 % VOCAB_SIZE
KINDS = ("embedding", "head")


def student(family, plan, *, tied):
    return quantize_plainly(TINY_MODELS[family](tied=tied), plan)


def trainer_of(model, kinds=KINDS, rate=1e-3):
    """Return a trainer of latent weights and scales, no weight in the middle of its cell."""
    generator = torch.Generator().manual_seed(0)

    def weight_of(name):
        weight = model.get_submodule(name).fake_quantized_weight().detach()
        return weight + 0.02 * torch.randn(weight.shape, generator=generator)

    chosen = choose_trainable(model, kinds=kinds, parts=("weights", "scales"), weight_of=weight_of)
    form_weights(quantized_layers(model).values(), torch.float32)
    return Trainer(
        model=model,
        layers=trained_layers(model),
        optimizer=make_optimizer(chosen, dict.fromkeys(chosen, rate), 0.0),
        divergence=forward_kl,
        dtype=torch.float32,
        clip_grad_norm=0.0,
        sync=lambda: None,
    )


def teacher_signal(family, *, tied):
    logits = TINY_MODELS[family](tied=tied)(IDS).logits[:, :-1]
    return dense_signal(logits, torch.ones(3, 11, dtype=torch.bool))


def reference_gradients(model, signal):
    """Return the gradients that autograd finds through the model's own forward."""
    for layer in quantized_layers(model).values():
        layer.held_weight = None
    loss = forward_kl(model(IDS).logits[:, :-1], signal)[signal.mask].mean()
    layers = [m for kind in KINDS for m in layers_of_kind(model, kind).values()]
    names = [f"{i}.{n}" for i, m in enumerate(layers) for n in ("latent_weight", "scale")]
    tensors = [getattr(m, n) for m in layers for n in ("latent_weight", "scale")]
    return dict(zip(names, torch.autograd.grad(loss, tensors), strict=True))


@pytest.mark.parametrize(("family", "tied"), FAMILY_TIED)
def test_gradients_of_both_uses_add_up(family, tied):
    """Through the chunked loss as through the model's own forward, embedding scale included."""
    plan = "q4a4, embed=int4-g32" if tied else "q4a4, embed=int4-g32, head=lut4-g32"
    model, signal = student(family, plan, tied=tied), teacher_signal(family, tied=tied)
    trainer = trainer_of(model)
    expected = reference_gradients(copy.deepcopy(model), signal)
    trainer.form()
    trainer.accumulate([Batch.of(IDS, signal)], None)
    trainer.pull()
    layers = [m for kind in KINDS for m in layers_of_kind(model, kind).values()]
    assert len(layers) == (1 if tied else 2)
    for key, gradient in expected.items():
        place, _, name = key.partition(".")
        found = getattr(layers[int(place)], name).grad
        assert gradient.abs().max() > 0
        assert torch.allclose(found, gradient, atol=1e-6, rtol=1e-4), key


@pytest.mark.recipe
def test_training_the_embedding_alone_lowers_the_loss():
    """With one latent weight for both uses."""
    model = student("llama", "q4a4, embed=int2-g64", tied=True)
    signal = teacher_signal("llama", tied=True)
    trainer = trainer_of(model, rate=1e-2)
    assert [name for name, _ in model.named_parameters() if "latent" in name] == [
        "model.embed_tokens.latent_weight"
    ]
    losses = [float(trainer.step([Batch.of(IDS, signal)], 1.0)[0]) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0], losses


def test_a_frozen_head_costs_no_gradient():
    """Where only MLP layers train, the head's weight is no input of the loss."""
    model = student("llama", "q4a4, embed=int4-g32", tied=True)
    trainer = trainer_of(model, kinds=("mlp",))
    trainer.form()
    assert trainer.head_weight() is None
    trainer.accumulate([Batch.of(IDS, teacher_signal("llama", tied=True))], None)
    pull_gradients(trainer.layers)
    assert model.get_input_embeddings().latent_weight is None
