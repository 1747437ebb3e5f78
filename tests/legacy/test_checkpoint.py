"""The seeds' checkpoints mean here what they mean there, and what is not theirs is refused."""

import json
import tarfile

import lz4.frame
import pytest
import torch

from qat.legacy.checkpoint import content_fingerprint, open_seed_checkpoint, seed_notes
from qat.legacy.student import write_seed_checkpoint
from qat.model.checkpoint import (
    CheckpointHeader,
    bits_per_weight,
    read_checkpoint,
    write_checkpoint,
)
from qat.model.surgery import quantized_layers
from qat.pipelines.open_checkpoint import (
    checkpoint_path,
    latent_or_base_weights,
    load_model,
    open_checkpoint,
)
from qat.quant.plan import kind_specs
from qat.quant.spec import make_spec
from qat.storage.files import read_json
from tests.seeds import make_v1, make_v2, v2_scale
from tests.tiny import save_tiny, tiny_llama, tiny_qwen3, tiny_student

TOKEN_IDS = torch.arange(12).view(2, 6)
GATE = "model.layers.0.mlp.gate_proj"
QUERY = "model.layers.1.self_attn.q_proj"


def close(student, wanted):
    """Whether every quantized weight is the wanted one to float32 rounding."""
    layers = quantized_layers(student)
    assert layers.keys() == wanted.keys()
    return all(
        (layers[name].fake_quantized_weight() - weight).abs().max() <= 2e-6 * weight.abs().max()
        for name, weight in wanted.items()
    )


def logits(model):
    with torch.no_grad():
        return model(TOKEN_IDS).logits


# What a checkpoint means


def test_second_form(tmp_path):
    """Unit directions, magnitudes with 1e-6 added, negative scales as they are; dense parts too."""
    made = make_v2(tmp_path)
    student, header = load_model(made.write(tmp_path / "run"))
    assert close(student, made.wanted)
    assert min(float(weight.min()) for weight in made.wanted.values()) < 0
    embedding = student.get_input_embeddings().weight
    assert torch.equal(embedding, made.state["model.embed_tokens.weight"])
    specs = kind_specs(header.plan)
    assert specs == {
        "mlp": make_spec(2, rank=6, stored_dtype="float32"),
        "attention": make_spec(4, rank=3, stored_dtype="float32"),
    }
    assert header.base_model["name"] == "base"


def test_biases_stay_with_their_layers(tmp_path):
    """A base model with attention biases keeps them."""
    made = make_v2(tmp_path, model={"attention_bias": True})
    made.state[f"{QUERY}.bias"] = torch.randn(64)
    student, _ = load_model(made.write(tmp_path / "run"))
    assert torch.equal(student.get_submodule(QUERY).bias, made.state[f"{QUERY}.bias"])


def test_baked_scales_are_taken_as_they_are(tmp_path):
    """With the flag nothing is normalized and nothing is added."""
    made = make_v2(tmp_path)
    for name in made.wanted:
        made.state[f"{name}._scales_baked_flag"] = torch.tensor(1, dtype=torch.int8)
        made.state[f"{name}.rank_magnitude"] = torch.ones_like(made.state[f"{name}.rank_magnitude"])
        scale = made.state[f"{name}.scale_A"] @ made.state[f"{name}.scale_B"]
        made.wanted[name] = made.state[f"{name}._Q"] * scale
    student, _ = load_model(made.write(tmp_path / "run"))
    assert close(student, made.wanted)


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
    for name in made.wanted:
        for part in dropped:
            del made.state[f"{name}.{part}"]
    student, _ = load_model(made.write(tmp_path / "run"))
    assert close(student, made.wanted)


def test_without_codes_the_latent_weight_is_rounded(tmp_path):
    """A fresh conversion of theirs holds no codes at all: the nearest values of weight / S."""
    made = make_v2(tmp_path)
    for name, weight in made.wanted.items():
        del made.state[f"{name}._indices"], made.state[f"{name}._Q"]
        made.state[f"{name}.weight"] = weight * 1.001
    student, _ = load_model(made.write(tmp_path / "run"))
    assert close(student, made.wanted)


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


def test_words_of_the_config_are_heeded(tmp_path):
    """Forced positive factors and an activation of magnitudes come before normalizing."""
    made = make_v2(tmp_path, force_positive_scales=True, magnitude_activation="softplus")
    plain = make_v2(tmp_path)
    for name in made.wanted:
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
    for name in list(made.wanted):
        if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")):
            made.state[f"{name}._lut_raw_deltas"] = steps
    student, _ = load_model(made.write(tmp_path / "run"))
    least = 2 * 2**-10  # two spacings of float16 below one
    shares = steps.exp() / steps.exp().sum()
    positive = torch.tensor([(least + (1 - 8 * least) * s) for s in shares]).cumsum(0)
    wanted = torch.cat([-positive.flip(0), positive])
    layer = student.get_submodule(QUERY)
    assert torch.allclose(layer.codebook, wanted, atol=1e-3)
    assert torch.equal(layer.codebook, layer.codebook.half().float())
    assert torch.equal(layer.indices.long(), made.state[f"{QUERY}._indices"])


def test_first_form(tmp_path):
    """The floor of 1e-8, the padded columns and rounding on the exact even grid."""
    made = make_v1(tmp_path)
    student, header = load_model(made.write(tmp_path / "run", "model_state_dict.pt"))
    assert close(student, made.wanted)
    floored = sum(int((weight.abs() <= 1e-8).sum()) for weight in made.wanted.values())
    assert floored > 100
    assert kind_specs(header.plan)["mlp"].floor == 1e-8


def test_first_form_rounds_on_the_exact_grid(tmp_path):
    """The nearest of `lut`'s float16 copies is another index near a border; theirs decides."""
    made = make_v1(tmp_path)
    scale = made.wanted[QUERY].abs().max()
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


# Where a checkpoint is found


@pytest.mark.parametrize("suffix", [".tgz", ".tar.lz4"])
def test_found_in_an_archive(tmp_path, suffix):
    """An archive is unpacked beside itself, once, also with a folder nested in its like."""
    made = make_v2(tmp_path)
    made.write(tmp_path / "in" / "v2_best" / "v2_best", "anything.pt")
    archive = tmp_path / f"v2_best{suffix}"
    if suffix == ".tgz":
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(tmp_path / "in" / "v2_best", arcname="v2_best")
    else:
        with lz4.frame.open(archive, "wb") as stream, tarfile.open(fileobj=stream, mode="w") as tar:
            tar.add(tmp_path / "in" / "v2_best", arcname="v2_best")
    for _ in range(2):
        student, _ = load_model(archive)
        assert close(student, made.wanted)
    assert checkpoint_path(archive).name == "anything.pt"


def test_found_in_folders(tmp_path):
    """A run's folder, the folder above it, and the best file among several."""
    made = make_v2(tmp_path / "x")
    file = made.write(tmp_path / "x" / "run")
    assert checkpoint_path(tmp_path / "x" / "run") == file
    torch.save(made.state, tmp_path / "x" / "run" / "checkpoint_step100.pt")
    assert checkpoint_path(tmp_path / "x") == file
    file.rename(file.with_name("checkpoint_step200.pt"))
    with pytest.raises(ValueError, match=r"several checkpoints.*step100.*name one"):
        checkpoint_path(tmp_path / "x" / "run")


def test_the_base_model_is_sought_and_may_be_given(tmp_path):
    """A folder that the config names is sought beside the run; --model-id comes first."""
    made = make_v2(tmp_path)
    file = made.write(tmp_path / "run")
    assert open_checkpoint(file).text_folder.resolve() == (tmp_path / "base").resolve()
    other = save_tiny(tmp_path / "other", tiny_qwen3())
    assert open_checkpoint(file, model_id=str(other)).text_folder == other
    made.config["model_id"] = "./nowhere"
    with pytest.raises(FileNotFoundError, match=r"nowhere.*--model-id"):
        open_checkpoint(made.write(tmp_path / "run"))
    del made.config["model_id"]
    with pytest.raises(FileNotFoundError, match="names no full-precision model"):
        open_checkpoint(made.write(tmp_path / "run"))


def test_nested_state_dicts_carry_their_config(tmp_path):
    """Their converter of the first form writes {model_state_dict, config} and no config.json."""
    made = make_v2(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"model_state_dict": made.state, "config": made.config}, folder / "v2.pt")
    student, _ = load_model(folder / "v2.pt")
    assert close(student, made.wanted)


def test_dense_parts_come_from_the_base_where_there_are_none(tmp_path):
    """A file of quantized layers alone is completed; one that lacks some parts is refused."""
    made = make_v2(tmp_path)
    layers = {
        key: value for key, value in made.state.items() if key.rpartition(".")[0] in made.wanted
    }
    whole, _ = load_model(made.write(tmp_path / "whole"))
    made.state = layers
    student, _ = load_model(made.write(tmp_path / "run"))
    assert torch.equal(logits(student), logits(whole))


# What is refused


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (f"{GATE}.scale_B", "missing keys"),
        (f"{GATE}.lut", "missing keys"),
        (f"{GATE}.rank_magnitude", "missing keys"),
        (f"{QUERY}.scale_A", "unknown keys|missing keys"),
        ("model.norm.weight", "missing keys"),
        ("model.embed_tokens.weight", "missing keys"),
    ],
)
def test_missing_keys_are_named(tmp_path, key, message):
    """The message names what is missing, and the file."""
    made = make_v2(tmp_path)
    del made.state[key]
    with pytest.raises(ValueError, match=message) as caught:
        load_model(made.write(tmp_path / "run"))
    assert key.rpartition(".")[0] in str(caught.value)
    assert "best_state_dict.pt" in str(caught.value)


@pytest.mark.parametrize("key", [f"{GATE}.A_lut", "model.layers.0.mlp.extra.weight", "other"])
def test_unknown_keys_are_named(tmp_path, key):
    """Nothing is dropped in silence."""
    made = make_v2(tmp_path)
    made.state[key] = torch.zeros(3)
    with pytest.raises(ValueError, match=f"unknown keys: {key}"):
        load_model(made.write(tmp_path / "run"))


DAMAGE = {
    "a value outside the codebook": (
        "_Q",
        lambda values: values + 0.01,
        r"gate_proj\._Q holds \d+ values that .*lut lacks",
    ),
    "an infinite scale": (
        "scale_A",
        lambda values: values * torch.inf,
        r"gate_proj\.scale_A holds NaN or infinity",
    ),
    "another shape": (
        "scale_B",
        lambda values: values[:-1],
        r"gate_proj\.scale_B has shape",
    ),
    "five values": ("lut", lambda values: torch.linspace(-1, 1, 5), r"gate_proj\.lut has 5 values"),
    "a rank of its own": (
        "rank_magnitude",
        lambda values: values[:2],
        r"gate_proj\.rank_magnitude has shape",
    ),
}


@pytest.mark.parametrize(("part", "damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_named(tmp_path, part, damage, message):
    """Layer, key and what is wrong, before anything is computed."""
    made = make_v2(tmp_path)
    made.state[f"{GATE}.{part}"] = damage(made.state[f"{GATE}.{part}"])
    with pytest.raises(ValueError, match=message):
        load_model(made.write(tmp_path / "run"))


def test_an_index_outside_the_codebook_is_named(tmp_path):
    """Indices decide where there are no values, and must be in range."""
    made = make_v2(tmp_path)
    del made.state[f"{GATE}._Q"]
    made.state[f"{GATE}._indices"][0, 0] = 4
    with pytest.raises(ValueError, match=r"gate_proj\._indices reaches 0 \.\. 4"):
        load_model(made.write(tmp_path / "run"))


def test_recovery_adapters(tmp_path):
    """An adapter of zeros changes nothing; any other is refused, as no quantized layer holds it."""
    made = make_v2(tmp_path)
    made.state[f"{GATE}.lora_A"], made.state[f"{GATE}.lora_B"] = (
        torch.randn(2, 64),
        torch.zeros(128, 2),
    )
    student, _ = load_model(made.write(tmp_path / "run"))
    assert close(student, made.wanted)
    made.state[f"{GATE}.lora_B"][0, 0] = 1
    with pytest.raises(ValueError, match=r"gate_proj\.lora_B is a recovery adapter"):
        load_model(made.write(tmp_path / "run"))


def test_a_tied_head_must_be_the_embedding(tmp_path):
    """Their files hold the head twice; another head than the embedding is no tied model's."""
    made = make_v2(tmp_path)
    made.state["lm_head.weight"] = made.state["lm_head.weight"] + 1
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        load_model(made.write(tmp_path / "run"))


def test_other_files_are_refused_in_one_line(tmp_path):
    """A pickled object, a cut file, a state dict of no quantized model, text."""
    file = tmp_path / "x.pt"
    torch.save({"model": CheckpointHeader(plan={}, base_model={})}, file)
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        load_model(file)
    made = make_v2(tmp_path)
    whole = made.write(tmp_path / "run")
    file.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        load_model(file)
    torch.save({"weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="no scale_A key"):
        load_model(file)
    torch.save([torch.zeros(2)], file)
    with pytest.raises(ValueError, match="no state dict"):
        load_model(file)
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(ValueError, match="is no checkpoint"):
        load_model(tmp_path / "x.txt")


def test_another_models_base_is_refused(tmp_path):
    """A base model of other sizes does not fit, and the tensor is named."""
    made = make_v2(tmp_path)
    other = save_tiny(tmp_path / "other", tiny_qwen3(intermediate_size=192))
    with pytest.raises(ValueError, match=r"mlp\.gate_proj"):
        load_model(made.write(tmp_path / "run"), model_id=str(other))


# What is written


def fitted(plan="q2a4_r4", **changes):
    return tiny_student("llama", plan, **changes)


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
        wanted = quantized_layers(student)[name].fake_quantized_weight()
        assert torch.allclose(layer.fake_quantized_weight(), wanted, rtol=3e-6, atol=1e-7)
        if not layer.spec.rank:
            assert torch.equal(layer.fake_quantized_weight(), wanted)
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
    wanted = student.get_submodule(GATE).fake_quantized_weight()
    assert (values * scale - wanted).abs().max() <= 2e-6 * wanted.abs().max()
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


def test_latent_weights_travel_along(tmp_path):
    """What was fitted to is written, and given back by name; elsewhere the base model's weight."""
    made = make_v2(tmp_path)
    opened = open_checkpoint(made.write(tmp_path / "run"))
    weight_of = latent_or_base_weights(opened)
    assert torch.equal(weight_of(GATE), made.state[f"{GATE}.weight"])
    for name in made.wanted:
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
