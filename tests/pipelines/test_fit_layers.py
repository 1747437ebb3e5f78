from dataclasses import replace

import pytest
import torch

from qat.calibrate.statistics import collect_second_moments
from qat.model.layers import FakeQuantLinear
from qat.model.surgery import dense_weights, quantized_layers
from qat.pipelines.fit_layers import (
    FitTask,
    OutputGrams,
    fit_by_decoder_layers,
    fit_with_moments,
)
from qat.quant.drift import Correction, Moments, wanted_weight
from qat.quant.fit import fit_weight
from qat.quant.hessian import hessian_error
from tests.tiny import plan_of, quantize_plainly, quick_fits, tiny_llama


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(261, (4, 12), generator=generator) for _ in range(4)]


def task_of(model, plan="q2a4"):
    """Return what `quantize_model` fits, checked as it checks."""
    found = plan_of(model, plan)
    modules = dense_weights(model, found)
    task = FitTask(
        specs=found.quantized, weight_of=lambda name: modules[name].weight, row_weights={}
    )
    task.check()
    return task


def moments_of(model):
    return collect_second_moments(model, dense_weights(model, plan_of(model)), batches())


def by_decoder_layers(model):
    fit_by_decoder_layers(model, task_of(model), batches(), dtype=torch.float32)


def test_every_linear_is_replaced_by_its_own_fit():
    """Weight by weight what `fit_weight` gives, biases kept, everything else untouched."""
    base = tiny_llama(attention_bias=True)
    importance = moments_of(base)
    student = tiny_llama(attention_bias=True)
    task = task_of(student)
    with quick_fits():
        fit_with_moments(student, task, importance)
    layers = quantized_layers(student)
    assert len(layers) == 14
    for name in list(layers)[::5]:
        linear = base.get_submodule(name)
        with quick_fits():
            expected = fit_weight(linear.weight, task.specs[name], importance=importance[name])
        assert torch.equal(layers[name].fake_quantized_weight(), expected.dequantize())
        if linear.bias is not None:
            assert torch.equal(layers[name].bias, linear.bias)
    dense = dict(student.named_parameters())
    for name, parameter in base.named_parameters():
        if name in dense and "proj" not in name:
            assert torch.equal(dense[name], parameter)
    assert not any(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("make", [quantize_plainly, by_decoder_layers])
def test_a_weight_that_cannot_be_held_names_its_layer(make):
    """NaN in one tensor of a model, found before the others are fitted."""
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: the weight holds NaN"):
        make(*((model, "q2a4") if make is quantize_plainly else (model,)))
    assert not any(isinstance(module, FakeQuantLinear) for module in model.modules())


@pytest.mark.recipe
@pytest.mark.parametrize("plan", ["gguf:q4_0", "gguf:q4_1", "linears=gguf:q2_0"])
def test_weights_of_one_format_are_fitted_as_one(plan):
    """As rows of one weight each comes out as it does alone, also where only one is corrected."""
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    task = task_of(model, plan)
    first, second = (f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up"))
    x, drift = torch.randn(400, 64) @ torch.randn(64, 64), 0.1 * torch.randn(400, 64)
    moments = Moments(hessian=x.T @ x / 400, drift=drift.T @ x / 400)
    corrections = {first: Correction(ridge=0.1, share=0.7), second: Correction(ridge=1.0, share=0)}
    joint = task.fit_against([first, second], moments, corrections)
    for name in (first, second):
        alone = task.fit_against([name], moments, corrections)[name]
        assert (joint[name].indices != alone.indices).float().mean() < 0.01
        aim = wanted_weight(task.weight_of(name), moments, corrections[name])
        target = task.weight_of(name) if aim is None else aim[:]
        errors = [hessian_error(target, one, moments.hessian) for one in (joint[name], alone)]
        assert errors[0] == pytest.approx(errors[1], rel=0.01)
    learned = task_of(tiny_llama(), "q2a4")
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    assert learned.of_one_format(names) == [[name] for name in names]
    assert task.of_one_format([first, second]) == [[first, second]]


@pytest.mark.recipe
def test_weights_whose_outputs_are_related_are_fitted_in_turns():
    """Each weight by its own G, run by run, in one loop over their inputs."""
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    names = [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")]
    generator = torch.Generator().manual_seed(0)
    shared = [torch.randn(128, 4, generator=generator) for _ in names]
    grams = {name: [part @ part.T] for name, part in zip(names, shared, strict=True)}
    runs = {name: [gram[:50, :50], gram[50:, 50:]] for name, (gram,) in grams.items()}
    plain = task_of(model, "linears=gguf:q2_0")
    x = torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    moments = Moments(hessian=x.T @ x / 400, drift=torch.zeros(64, 64))
    corrections = dict.fromkeys(names, Correction(ridge=0.1, share=0.0))

    def costs(task):
        fitted = task.fit_against(names, moments, corrections)
        errors = {name: fitted[name].dequantize() - plain.weight_of(name) for name in names}
        return [float(((grams[n][0] @ e) * (e @ moments.hessian)).sum()) for n, e in errors.items()]

    alone, whole, split = (
        costs(replace(plain, grams=OutputGrams(runs=one))) for one in ({}, grams, runs)
    )
    for a, b, c in zip(alone, whole, split, strict=True):
        assert b < c < a
        assert b < 0.8 * a


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_embedding_is_fitted_to_serve_as_input_too(tied):
    """By the gradient's second moment at its rows; a head of its own is not."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    kept = 100.0 * rows.T @ rows / 200
    base = tiny_llama(tied=tied)
    name = "model.embed_tokens" if tied else "lm_head"

    def fitted(grams):
        model = tiny_llama(tied=tied)
        task = replace(task_of(model, f"{name}=gguf:q4_0"), grams=grams)
        fit_by_decoder_layers(model, task, batches(), dtype=torch.float32)
        error = model.get_submodule(name).fake_quantized_weight() - base.get_submodule(name).weight
        return error, float(((error @ kept) * error).sum())

    (error, alone), (other, both) = (fitted(OutputGrams(embedding=g)) for g in (None, kept))
    assert both < 0.7 * alone if tied else torch.equal(error, other)


@pytest.mark.recipe
def test_a_head_is_fitted_in_groups_where_other_weights_are_in_turns(monkeypatch):
    """By the walk itself, tied embedding and all; every row is there, near where it was."""
    model = tiny_llama(hidden_size=64, intermediate_size=128, vocab_size=600)
    before = model.get_input_embeddings().weight.detach().clone()
    task = task_of(model, "linears=gguf:q4_0, embed=gguf:q4_0")
    assert "model.embed_tokens" in task.specs
    runs = {"model.layers.0.mlp.up_proj": [torch.eye(128)]}
    task = replace(task, grams=OutputGrams(runs=runs, embedding=torch.eye(64)))
    seen = []
    fit = FitTask.fit_in_groups

    def watch(self, name, *arguments):
        seen.append((name, len(arguments[-1].groups)))
        return fit(self, name, *arguments)

    monkeypatch.setattr(FitTask, "fit_in_groups", watch)
    batches = list(torch.randint(600, (2, 16, 20)))
    fit_by_decoder_layers(model, task, batches, dtype=torch.float32)
    assert seen == [("model.embed_tokens", 2)]
    found = model.get_input_embeddings().fake_quantized_weight()
    assert (found - before).norm() < 0.15 * before.norm()
