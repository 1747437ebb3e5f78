"""What the tensors of a layer in the seeds' forms mean."""

import pytest
import torch

from qat.pipelines.open_checkpoint import (
    load_model,
)
from qat.quant.plan import kind_specs
from qat.quant.spec import make_spec
from tests.seeds import close, make_v1, make_v2

TOKEN_IDS = torch.arange(12).view(2, 6)


GATE = "model.layers.0.mlp.gate_proj"


QUERY = "model.layers.1.self_attn.q_proj"


def logits(model):
    with torch.no_grad():
        return model(TOKEN_IDS).logits


def test_second_form(tmp_path):
    """Unit directions, magnitudes with 1e-6 added, negative scales as they are; dense parts too."""
    made = make_v2(tmp_path)
    student, header = load_model(made.write(tmp_path / "run"))
    assert close(student, made.expected)
    assert min(float(weight.min()) for weight in made.expected.values()) < 0
    embedding = student.get_input_embeddings().weight
    assert torch.equal(embedding, made.state["model.embed_tokens.weight"])
    specs = kind_specs(header.plan)
    assert specs == {
        "mlp": make_spec(2, rank=6, stored_dtype="float32"),
        "attention": make_spec(4, rank=3, stored_dtype="float32"),
    }
    assert header.base_model["name"] == "base"


def test_baked_scales_are_taken_as_they_are(tmp_path):
    """With the flag nothing is normalized and nothing is added."""
    made = make_v2(tmp_path)
    for name in made.expected:
        made.state[f"{name}._scales_baked_flag"] = torch.tensor(1, dtype=torch.int8)
        made.state[f"{name}.rank_magnitude"] = torch.ones_like(made.state[f"{name}.rank_magnitude"])
        scale = made.state[f"{name}.scale_A"] @ made.state[f"{name}.scale_B"]
        made.expected[name] = made.state[f"{name}._Q"] * scale
    student, _ = load_model(made.write(tmp_path / "run"))
    assert close(student, made.expected)


def test_tiny_norms_have_a_floor(tmp_path):
    """A direction shorter than 1e-6 is divided by 1e-6, not by its length."""
    made = make_v2(tmp_path)
    before = made.state[f"{GATE}.scale_A"].clone()
    made.state[f"{GATE}.scale_A"][:, 0] *= 1e-8 / float(before[:, 0].norm())
    student, _ = load_model(made.write(tmp_path / "run"))
    assert student.get_submodule(GATE).scale_a[:, 0].norm() == pytest.approx(1e-2, rel=1e-4)


@pytest.mark.parametrize("dropped", [("_indices",), ("_Q",), ("_scales_baked_flag",)])
def test_what_follows_from_the_rest_may_be_missing(tmp_path, dropped):
    """Values follow from indices, indices from values, and no flag is a flag of zero."""
    made = make_v2(tmp_path)
    for name in made.expected:
        for part in dropped:
            del made.state[f"{name}.{part}"]
    student, _ = load_model(made.write(tmp_path / "run"))
    assert close(student, made.expected)


def test_without_codes_the_latent_weight_is_rounded(tmp_path):
    """A fresh conversion of theirs holds no codes at all: the nearest values of weight / S."""
    made = make_v2(tmp_path)
    for name, weight in made.expected.items():
        del made.state[f"{name}._indices"], made.state[f"{name}._Q"]
        made.state[f"{name}.weight"] = weight * 1.001
    student, _ = load_model(made.write(tmp_path / "run"))
    assert close(student, made.expected)


@pytest.mark.recipe
def test_half_precision_checkpoints(tmp_path):
    """Files whose floats are float16 mean those numbers, normalized in float32."""
    made = make_v2(tmp_path)
    made.state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in made.state.items()
    }
    whole = make_v2(tmp_path)
    whole.state = {
        key: value.float() if value.is_floating_point() else value
        for key, value in made.state.items()
    }
    one, _ = load_model(made.write(tmp_path / "half"))
    other, _ = load_model(whole.write(tmp_path / "whole"))
    assert torch.equal(logits(one), logits(other))


@pytest.mark.recipe
def test_the_config_decides_how_scales_are_read(tmp_path):
    """Forced positive factors and an activation of magnitudes come before normalizing."""
    made = make_v2(tmp_path, force_positive_scales=True, magnitude_activation="softplus")
    plain = make_v2(tmp_path)
    for name in made.expected:
        for part in ("scale_A", "scale_B"):
            plain.state[f"{name}.{part}"] = made.state[f"{name}.{part}"].abs()
        magnitude = made.state[f"{name}.rank_magnitude"]
        plain.state[f"{name}.rank_magnitude"] = torch.log1p(magnitude.exp())
        for part in ("lut", "_Q", "_indices"):
            plain.state[f"{name}.{part}"] = made.state[f"{name}.{part}"]
    one, _ = load_model(made.write(tmp_path / "forced"))
    other, _ = load_model(plain.write(tmp_path / "plain"))
    assert torch.allclose(logits(one), logits(other), atol=1e-4)
    made.config["magnitude_activation"] = "square"
    with pytest.raises(ValueError, match="magnitude_activation 'square'"):
        load_model(made.write(tmp_path / "wrong"))


def test_codebooks_in_training(tmp_path):
    """Steps stand for a mirrored codebook of float16 numbers, not for what `lut` began with."""
    made = make_v2(tmp_path)
    steps = torch.randn(8)
    for name in list(made.expected):
        if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")):
            made.state[f"{name}._lut_raw_deltas"] = steps
    student, _ = load_model(made.write(tmp_path / "run"))
    least = 2 * 2**-10  # two spacings of float16 below one
    shares = steps.exp() / steps.exp().sum()
    positive = torch.tensor([(least + (1 - 8 * least) * s) for s in shares]).cumsum(0)
    expected = torch.cat([-positive.flip(0), positive])
    layer = student.get_submodule(QUERY)
    assert torch.allclose(layer.codebook, expected, atol=1e-3)
    assert torch.equal(layer.codebook, layer.codebook.half().float())
    assert torch.equal(layer.indices.long(), made.state[f"{QUERY}._indices"])


def test_first_form(tmp_path):
    """The floor of 1e-8, the padded columns and rounding on the exact even grid."""
    made = make_v1(tmp_path)
    student, header = load_model(made.write(tmp_path / "run", "model_state_dict.pt"))
    assert close(student, made.expected)
    floored = sum(int((weight.abs() <= 1e-8).sum()) for weight in made.expected.values())
    assert floored > 100
    assert kind_specs(header.plan)["mlp"].floor == 1e-8


def test_first_form_rounds_on_the_exact_grid(tmp_path):
    """The nearest of `lut`'s float16 copies is another index near a border; theirs decides."""
    made = make_v1(tmp_path)
    scale = made.expected[QUERY].abs().max()
    made.state[f"{QUERY}.scale_A"] = torch.full_like(made.state[f"{QUERY}.scale_A"], 0.5)
    made.state[f"{QUERY}.scale_B"] = torch.ones_like(made.state[f"{QUERY}.scale_B"]) * scale
    border = (-1 + 2 / 15 * 1.5) * scale
    nudge = (torch.rand_like(made.state[f"{QUERY}.weight"]) - 0.5) * 1e-3 * scale
    made.state[f"{QUERY}.weight"] = border + nudge
    student, _ = load_model(made.write(tmp_path / "run"))
    indices = student.get_submodule(QUERY).indices
    position = (made.state[f"{QUERY}.weight"] / scale + 1) * 7.5
    decided = (position - 1.5).abs() > 1e-5  # nearer, float32 decides
    assert torch.equal(indices[decided].long(), position.round().long()[decided])
    assert set(indices.unique().tolist()) == {1, 2}


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("scale_A", torch.zeros(3), "not 2 axes"),
        ("scale_B", torch.zeros(2, 2, 2), "not 2 axes"),
        ("rank_magnitude", torch.zeros(2, 2), "not 1 axes"),
        ("_scales_baked_flag", torch.zeros(2, dtype=torch.int8), "is no flag"),
        ("lut", torch.tensor([0.0, 1.0, 2.0, float("inf")]), "holds NaN or infinity"),
        ("_Q", torch.zeros(0), "not 2 axes"),
        ("_indices", torch.zeros(1, 1, dtype=torch.int64).to_sparse(), "no state dict"),
    ],
)
def test_tensors_of_another_form_are_named_with_their_file(tmp_path, part, value, said):
    """Their number of axes was taken for granted, and a sparse one was read as a plain one."""
    made = make_v2(tmp_path)
    made.state[f"{GATE}.{part}"] = value
    with pytest.raises(ValueError, match=rf"best_state_dict\.pt.*{said}"):
        load_model(made.write(tmp_path / "run"))
