"""`qat convert`: onto a runtime's grid, keeping what is there already, telling what it costs."""

import json

import pytest
import torch

from qat.cli.commands import main
from qat.model.surgery import layers_of_kind, quantized_layers
from qat.pipelines.open_checkpoint import load_model
from tests.tiny import (
    plan_of,
    quick_fits,
    save_student,
    save_tiny,
    tiny_cache,
    tiny_llama,
    tiny_student,
)

pytestmark = pytest.mark.recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache, and students of several plans made from its teacher."""
    folder = tmp_path_factory.mktemp("students")
    cache = tiny_cache(folder, seq_len=32)
    text_source = save_tiny(folder / "base", tiny_llama())
    for plan in ("q2a4", "q4a4_r4", "q2a4_int"):
        student = tiny_student("llama", plan)
        base = {"path": str(text_source), "name": "base"}
        save_student(folder / plan, student, text_source, plan=plan, base_model=base)
    (folder / "cache").symlink_to(cache)
    return folder


def convert(folder, capsys, plan, expected, output, *flags):
    command = ["--checkpoint", folder / plan, "--plan", expected, "--output", output, *flags]
    with quick_fits():
        code = main("convert", [str(part) for part in command])
    said = capsys.readouterr()
    return (code, json.loads(said.out) if code == 0 else said.err.splitlines()[-1])


@pytest.mark.parametrize("fit", ["hessian", "moments"])
@pytest.mark.parametrize("plan", ["q2a4", "q4a4_r4"])
def test_a_student_without_a_home_gets_one(tmp_path, folder, capsys, plan, fit):
    """Learned codebooks and low-rank scales end on GGUF's grid, with their cost in nats."""
    flags = ["--cache-dir", folder / "cache", "--fit", fit]
    code, closing = convert(folder, capsys, plan, "gguf:q2_0+gguf:q4_0", tmp_path / "a", *flags)
    assert code == 0, closing
    assert closing["layers_changed"] == 14
    change = closing["kl_nats_lower"] - closing["kl_nats_lower_before"]
    assert closing["kl_nats_lower_cost"] == pytest.approx(change)
    assert closing["weight_sqnr_db"] > 3
    assert closing["bits_per_weight_mlp"] == 2.25
    student, header = load_model(tmp_path / "a")
    expected = plan_of(student, "gguf:q2_0+gguf:q4_0")
    assert header.plan == expected.to_dict()
    layers = quantized_layers(student)
    assert {name: layer.spec for name, layer in layers.items()} == expected.quantized
    target = ["--checkpoint", str(tmp_path / "a"), "--to", "gguf", "--output", str(tmp_path / "g")]
    assert main("export", target) == 0


def test_layers_that_are_there_already_stay_to_the_bit(tmp_path, folder, capsys):
    """Attention keeps its grid; only MLP layers are fitted, also without a cache."""
    code, closing = convert(folder, capsys, "q2a4_int", "gguf:iq4_nl+gguf:q4_0", tmp_path / "a")
    assert code == 0, closing
    assert closing["layers_changed"] == 6
    assert not any("kl_nats" in key for key in closing)
    before, _header = load_model(folder / "q2a4_int")
    after, _header = load_model(tmp_path / "a")
    for name, layer in layers_of_kind(before, "attention").items():
        found = after.get_submodule(name).fake_quantized_weight()
        assert torch.equal(found, layer.fake_quantized_weight())


def test_what_cannot_be_is_refused(tmp_path, folder, capsys):
    """Nothing to change, a block that does not fit, an unknown name."""
    code, said = convert(folder, capsys, "q2a4_int", "gguf:q2_0+gguf:q4_0", tmp_path / "a")
    assert (code, "is of plan gguf:q2_0+gguf:q4_0 already" in said) == (2, True)
    code, said = convert(folder, capsys, "q2a4", "q2a4_g48", tmp_path / "a")
    assert (code, "lut2-g48 does not fit model.layers.0.mlp.gate_proj: group size 48" in said) == (
        2,
        True,
    )
    code, said = convert(folder, capsys, "q2a4", "gguf:q5_9", tmp_path / "a")
    assert (code, "is unknown" in said) == (2, True)
    assert not (tmp_path / "a").exists()
