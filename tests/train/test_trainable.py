import pytest
import torch

from qat.model.surgery import quantized_layers
from qat.train import trainable
from qat.train.trainable import (
    check_averages,
    choose_trainable,
    enable_gradient_checkpointing,
    make_optimizer,
    mode,
    rate_units,
    trained_layers,
)
from tests.tiny import TINY_MODELS, tiny_llama, tiny_student

NOTHING = {"weight_of": lambda _name: None}
BOTH = ("mlp", "attention")


def count_parameters(chosen):
    """Return the number of trained numbers by part."""
    return {part: sum(p.numel() for p in parameters) for part, parameters in chosen.items()}


def names(student):
    """Return the names of what trains."""
    return {name for name, p in student.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", TINY_MODELS)
def test_kinds_and_parts_decide_what_trains(family):
    """By the role of a layer and the part of it; everything else is frozen."""
    student = tiny_student(family, "q4_r4")
    choose_trainable(student, kinds=("mlp",), parts=("scales", "codebooks"), **NOTHING)
    found = names(student)
    assert found
    assert all(".mlp." in name for name in found)
    parts = {name.rpartition(".")[2] for name in found}
    assert parts == {"scale_a", "scale_b", "magnitude", "codebook"}
    choose_trainable(student, kinds=("attention",), parts=("magnitudes",), **NOTHING)
    assert {name.rpartition(".")[2] for name in names(student)} == {"magnitude"}
    assert all("self_attn" in name for name in names(student))


def test_other_formats_stay():
    """Only layers in the named formats train; formats that no layer has are named."""
    student = tiny_student(plan="q2a4")
    parts = ("weights", "scales")
    narrow = student.model.layers[0].mlp.up_proj.spec.name
    choose_trainable(student, kinds=BOTH, parts=parts, formats=(narrow,), **NOTHING)
    assert all(".mlp." in name for name in names(student))
    assert len(trained_layers(student)) == 6
    formats = ("gguf:q2_0", "int3-g32")
    with pytest.raises(ValueError, match="layers in gguf:q2_0, int3-g32"):
        choose_trainable(student, kinds=BOTH, parts=parts, formats=formats, **NOTHING)


def test_latent_weights_start_at_the_full_precision_ones():
    """Each layer is asked for by its name, and only those of the chosen kind."""
    student, base = tiny_student(), tiny_llama()
    asked = []

    def weight_of(name):
        asked.append(name)
        return base.get_submodule(name).weight

    before = {n: layer.fake_quantized_weight() for n, layer in quantized_layers(student).items()}
    chosen = choose_trainable(student, kinds=("mlp",), parts=("weights",), weight_of=weight_of)
    assert len(asked) == len(chosen["weights"]) == 6
    assert all(".mlp." in name for name in asked)
    for name, layer in quantized_layers(student).items():
        assert torch.equal(layer.fake_quantized_weight(), before[name])
        if name in asked:
            distance = (layer.latent_weight - base.get_submodule(name).weight).abs()
            assert (distance < 1e-5).float().mean() > 0.9


@pytest.mark.parametrize("family", TINY_MODELS)
def test_all_norms_train_in_float32(family):
    """Two or four a block, q and k norms where there are, and the last one."""
    student = tiny_student(family).bfloat16()
    chosen = choose_trainable(student, kinds=BOTH, parts=("norms",), **NOTHING)
    expected = [name for name, _ in student.named_parameters() if "norm" in name]
    assert len(chosen["norms"]) == len(expected) >= 5
    assert all(p.dtype == torch.float32 for p in chosen["norms"])
    assert names(student) == set(expected)


def test_nothing_to_train_is_refused():
    """Group scales have no magnitudes."""
    with pytest.raises(ValueError, match="--trainable magnitudes finds nothing.*low-rank scales"):
        choose_trainable(tiny_student(), kinds=BOTH, parts=("magnitudes",), **NOTHING)


def test_magnitudes_named_twice_train_once():
    """They count as scales already; one parameter in two groups ended in an error of torch."""
    student = tiny_student(plan="q4_r4")
    chosen = choose_trainable(student, kinds=BOTH, parts=("scales", "magnitudes"), **NOTHING)
    make_optimizer(chosen, {"scales": 1e-3, "magnitudes": 1e-4}, 0.0)
    count = sum(count_parameters(chosen).values())
    assert count == sum(p.numel() for p in student.parameters() if p.requires_grad)


def test_magnitudes_can_be_left_out():
    """Directions of low-rank scales move, their sizes stay."""
    student = tiny_student(plan="q4_r4")
    chosen = choose_trainable(student, kinds=BOTH, parts=("directions",), **NOTHING)
    assert {name.rpartition(".")[2] for name in names(student)} == {"scale_a", "scale_b"}
    assert len(chosen["directions"]) == 2 * 14


def test_each_part_has_its_rate_and_only_weights_decay():
    """One group a part; scales pulled to zero would shrink the model."""
    student = tiny_student()
    chosen = choose_trainable(student, kinds=BOTH, parts=("weights", "scales"), **NOTHING)
    optimizer = make_optimizer(chosen, {"weights": 1e-4, "scales": 1e-3}, 0.1)
    found = [(g["lr"], g["peak_lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(1e-4, 1e-4, 0.1), (1e-3, 1e-3, 0.0)]


def test_counts_are_of_numbers():
    """For the line that a run begins with."""
    student = tiny_student()
    chosen = choose_trainable(student, kinds=("mlp",), parts=("weights", "scales"), **NOTHING)
    assert count_parameters(chosen) == {"weights": 6 * 64 * 128, "scales": 6 * 64 * 128 // 32}
    assert len(trained_layers(student)) == 6


@pytest.mark.parametrize("family", TINY_MODELS)
def test_recomputed_activations_change_no_gradient(family):
    """Gradient checkpointing costs time, not bits."""
    found = []
    for is_on in (False, True):
        student = tiny_student(family)
        choose_trainable(student, kinds=BOTH, parts=("weights",), **NOTHING)
        if is_on:
            enable_gradient_checkpointing(student)
        with mode(student, is_training=True):
            student(torch.arange(12).view(2, 6), use_cache=False).logits.square().mean().backward()
        found.append([p.grad for p in student.parameters() if p.requires_grad])
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


def test_norms_are_found_by_their_weights_and_not_by_their_names():
    """A norm class of another name was left out, a head called a norm was taken for one."""

    class RootMeanSquare(type(tiny_llama().model.norm)):
        pass

    class NormHead(torch.nn.Linear):
        pass

    student = tiny_student()
    expected = {name for name, _ in student.named_parameters() if "norm" in name}
    for module in student.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.__class__ = RootMeanSquare
    student.lm_head.__class__ = NormHead
    choose_trainable(student, kinds=BOTH, parts=("norms",), **NOTHING)
    assert names(student) == expected


def test_modes_are_put_back():
    """Each module's own, also those that differ from the model's."""
    student = tiny_student().eval()
    student.model.norm.train()
    with mode(student, is_training=True):
        assert all(module.training for module in student.modules())
    assert [m for m in student.modules() if m.training] == [student.model.norm]


def test_relative_rates_are_shares_of_what_they_move():
    """A step moves latent weights by a share of their rounding errors, scales by one of their size.

    Formats of few and of many bits, whose cells and scales differ, then move alike.
    """
    base = tiny_llama()
    model = tiny_student("llama", "gguf:q2_0, *.down_proj=gguf:q4_0")
    chosen = choose_trainable(
        model,
        kinds=("mlp",),
        parts=("weights", "scales"),
        weight_of=lambda name: base.get_submodule(name).weight,
    )
    units = rate_units(model)
    optimizer = make_optimizer(chosen, {"weights": 0.5, "scales": 0.1}, units=units)
    rates = {id(group["params"][0]): group["peak_lr"] for group in optimizer.param_groups}
    for layer in trained_layers(model):
        latent, scale = layer.latent_weight.detach(), layer.scale.detach()
        error = latent - layer.fake_quantized_weight(torch.float32).detach()
        error = error[error != 0]
        assert len(error) > 0.5 * latent.numel()
        size = float(error.norm()) / len(error) ** 0.5
        assert rates[id(layer.latent_weight)] == pytest.approx(0.5 * size)
        assert rates[id(layer.scale)] == pytest.approx(0.1 * float(scale.square().mean().sqrt()))
    assert len({round(rate, 9) for rate in rates.values()}) == len(rates)


def test_averages_of_8_bits_are_refused_where_they_cannot_be_had(monkeypatch):
    """Without torchao, and where steps are traced; in float32 they can be had anywhere."""
    monkeypatch.setattr(trainable, "find_spec", lambda _name: None)
    check_averages(None, torch.device("xla"))
    with pytest.raises(ValueError, match="--optim.averages 8bit: torchao is not installed; pip"):
        check_averages("8bit", torch.device("cpu"))
    with pytest.raises(ValueError, match="no such step on xla; leave it out"):
        check_averages("8bit", torch.device("xla"))
