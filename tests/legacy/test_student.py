"""Whole students read from the seeds' form, and written in it."""

import json

import pytest
import torch

from qat.legacy.checkpoint import content_fingerprint, open_seed_checkpoint, seed_notes
from qat.legacy.student import write_seed_checkpoint
from qat.model.checkpoint import (
    bits_per_weight,
    read_checkpoint,
    write_checkpoint,
)
from qat.model.surgery import quantized_layers
from qat.pipelines.open_checkpoint import (
    latent_or_base_weights,
    load_model,
    open_checkpoint,
)
from qat.storage.files import read_json
from tests.seeds import make_v1, make_v2, v2_scale
from tests.tiny import save_tiny, tiny_llama, tiny_qwen3, tiny_student

TOKEN_IDS = torch.arange(12).view(2, 6)


GATE = "model.layers.0.mlp.gate_proj"


QUERY = "model.layers.1.self_attn.q_proj"


def logits(model):
    with torch.no_grad():
        return model(TOKEN_IDS).logits


def fitted(plan="q2a4_r4", **changes):
    return tiny_student("llama", plan, **changes)


def test_biases_stay_with_their_layers(tmp_path):
    """A base model with attention biases keeps them."""
    made = make_v2(tmp_path, model={"attention_bias": True})
    made.state[f"{QUERY}.bias"] = torch.randn(64)
    student, _ = load_model(made.write(tmp_path / "run"))
    assert torch.equal(student.get_submodule(QUERY).bias, made.state[f"{QUERY}.bias"])


@pytest.mark.recipe
def test_dense_parts_come_from_the_base_where_there_are_none(tmp_path):
    """A file of quantized layers alone is completed; one that lacks some parts is refused."""
    made = make_v2(tmp_path)
    layers = {
        key: value for key, value in made.state.items() if key.rpartition(".")[0] in made.expected
    }
    whole, _ = load_model(made.write(tmp_path / "whole"))
    made.state = layers
    student, _ = load_model(made.write(tmp_path / "run"))
    assert torch.equal(logits(student), logits(whole))


def test_a_tied_head_must_be_the_embedding(tmp_path):
    """Their files hold the head twice; another head than the embedding is no tied model's."""
    made = make_v2(tmp_path)
    made.state["lm_head.weight"] = made.state["lm_head.weight"] + 1
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        load_model(made.write(tmp_path / "run"))


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("plan", "tied"),
    [
        ("q2a4_r4", True),
        ("q2a4_r4", False),
        ("q4a4_r6", True),
        ("q2a4", True),
        ("q2a4_g64", True),
        ("q4a2_g16", True),
    ],
)
def test_our_students_survive_their_form(tmp_path, plan, tied):
    """Float16 factors and group scales come back to the bit, at the same bits per weight."""
    base = save_tiny(tmp_path / "base", tiny_llama(tied=tied))
    student = fitted(plan, tied=tied)
    file = tmp_path / "run" / "q2_init.pt"
    write_seed_checkpoint(student, file, model_id="base")
    found, _ = load_model(file, model_id=str(base))
    for name, layer in quantized_layers(found).items():
        expected = quantized_layers(student)[name].fake_quantized_weight()
        assert torch.allclose(layer.fake_quantized_weight(), expected, rtol=3e-6, atol=1e-7)
        if not layer.spec.rank:
            assert torch.equal(layer.fake_quantized_weight(), expected)
    assert bits_per_weight(found) == bits_per_weight(student)


def test_the_written_form_is_theirs(tmp_path):
    """Their keys, dtypes and shapes; their formula gives the student's weight; config in words."""
    student = fitted("q2a4_r4")
    file = tmp_path / "q2_init.pt"
    write_seed_checkpoint(student, file, model_id="some/model", notes={"a": 1})
    state = torch.load(file, weights_only=True)
    parts = {key.removeprefix(f"{GATE}.") for key in state if key.startswith(f"{GATE}.")}
    assert parts == {
        *("weight", "lut", "scale_A", "scale_B", "rank_magnitude"),
        *("_Q", "_indices", "_scales_baked_flag"),
    }
    assert state[f"{GATE}._indices"].dtype == torch.int64
    assert state[f"{GATE}._Q"].dtype == state[f"{GATE}.weight"].dtype == torch.float32
    assert state[f"{GATE}._scales_baked_flag"].dtype == torch.int8
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    scale = v2_scale(
        *(state[f"{GATE}.{part}"] for part in ("scale_A", "rank_magnitude", "scale_B"))
    )
    values = state[f"{GATE}.lut"][state[f"{GATE}._indices"]]
    assert torch.equal(values, state[f"{GATE}._Q"])
    expected = student.get_submodule(GATE).fake_quantized_weight()
    assert (values * scale - expected).abs().max() <= 2e-6 * expected.abs().max()
    config = read_json(tmp_path / "config.json")
    assert config["version"] == "v2"
    assert config["model_id"] == "some/model"
    assert (config["mlp_lut_bits"], config["attn_lut_bits"]) == (2, 4)
    assert (config["scale_rank"], config["attn_scale_rank"]) == (4, 4)
    assert config["force_positive_scales"] is False


def test_a_preset_is_named_where_it_fits(tmp_path):
    """Their trainer takes sizes from a preset's name, so the name is given only for its sizes."""
    write_seed_checkpoint(fitted("q4a4_r4"), tmp_path / "a.pt", model_id="base")
    assert read_json(tmp_path / "config.json")["config_preset"] == "q4a4"
    write_seed_checkpoint(fitted("q4a4_r6"), tmp_path / "a.pt", model_id="base")
    assert "config_preset" not in read_json(tmp_path / "config.json")


@pytest.mark.recipe
def test_latent_weights_travel_along(tmp_path):
    """What was fitted to is written, and given back by name; elsewhere the base model's weight."""
    made = make_v2(tmp_path)
    opened = open_checkpoint(made.write(tmp_path / "run"))
    weight_of = latent_or_base_weights(opened)
    assert torch.equal(weight_of(GATE), made.state[f"{GATE}.weight"])
    for name in made.expected:
        del made.state[f"{name}.weight"]
    opened = open_checkpoint(made.write(tmp_path / "bare"))
    original = tiny_qwen3().get_submodule(GATE).weight
    assert torch.equal(latent_or_base_weights(opened)(GATE), original)
    student, _ = load_model(opened.path)
    file = tmp_path / "again" / "x.pt"
    write_seed_checkpoint(student, file, model_id="base", weight_of=lambda _name: original * 2)
    assert torch.equal(torch.load(file)[f"{GATE}.weight"], original * 2)


def test_notes_belong_to_their_file(tmp_path):
    """A config that another file's writing replaced says nothing of this one."""
    student = fitted("q2a4_r4")
    write_seed_checkpoint(student, tmp_path / "a.pt", model_id="m", notes={"a": 1})
    assert seed_notes(open_seed_checkpoint(tmp_path / "a.pt"))["a"] == 1
    write_seed_checkpoint(fitted("q4a4_r4"), tmp_path / "b.pt", model_id="m", notes={"b": 2})
    assert seed_notes(open_seed_checkpoint(tmp_path / "a.pt")) == {}
    assert seed_notes(open_seed_checkpoint(tmp_path / "b.pt"))["b"] == 2
    assert content_fingerprint(tmp_path / "a.pt") != content_fingerprint(tmp_path / "b.pt")


@pytest.mark.recipe
def test_native_folders_hold_such_students(tmp_path):
    """Float32 scales, floors and all: the folder gives the same logits to the bit."""
    for maker in (make_v1, make_v2):
        made = maker(tmp_path / maker.__name__)
        student, header = load_model(made.write(tmp_path / maker.__name__ / "run"))
        folder = tmp_path / maker.__name__ / "native"
        write_checkpoint(student, header, folder, text_source=made.base)
        again, written = read_checkpoint(folder)
        assert torch.equal(logits(again), logits(student))
        assert written.plan == header.plan
        json.dumps(header.plan, allow_nan=False)
