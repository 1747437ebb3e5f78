"""What the predecessor's own code wrote and computed is what is computed here."""

import json
from pathlib import Path

import pytest
import torch

from qat.cli.commands import PIPELINES, main
from qat.legacy.student import write_seed_checkpoint
from qat.model.checkpoint import CheckpointHeader, read_checkpoint, write_checkpoint
from qat.model.rankwise import RankwiseLinear
from qat.model.surgery import quantized_layers, swap
from qat.pipelines.open_checkpoint import load_model
from qat.storage.files import read_json
from tests.seeds import FIXTURES

SECOND = ("v2_q2a4_qwen3", "v2_q4a4_qwen3")
FIRST = "v1_q2a4_qwen3"
TOLERANCE = 1e-4

pytestmark = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="the seeds' fixtures are not beside the project"
)


def logits(name, model):
    expected = torch.load(FIXTURES / name / "expected_logits.pt", weights_only=True)
    with torch.no_grad():
        found = model(expected["input_ids"].long()).logits
    return found, expected["logits"]


def worst(name, model):
    found, expected = logits(name, model)
    return float((found - expected).abs().max())


def cache_of(name):
    (folder,) = (FIXTURES / name / "caches").iterdir()
    return folder


def closing(command, *flags, capsys):
    capsys.readouterr()
    assert main(command, [str(flag) for flag in flags]) == 0
    return json.loads(capsys.readouterr().out)


def measured(checkpoint, name, capsys, *flags):
    return closing(
        "evaluate",
        *("--checkpoint", checkpoint, "--cache-dir", cache_of(name), "--dtype", "fp32", *flags),
        capsys=capsys,
    )


@pytest.mark.parametrize("name", [*SECOND, FIRST])
def test_logits_are_theirs(name):
    """Loaded from the run's folder; twenty times closer than asked."""
    student, _ = load_model(FIXTURES / name / "run")
    assert worst(name, student) < TOLERANCE / 20


@pytest.mark.parametrize("name", [*SECOND, FIRST])
def test_kd_loss_is_theirs(name, capsys):
    """Over the first 40 sequences of the cache, or all that it has."""
    found = measured(FIXTURES / name / "run", name, capsys)
    expected = read_json(FIXTURES / name / "expected.json")["kd_loss"]
    assert abs(found["kd_loss"] - expected) < 1e-6


@pytest.mark.parametrize("name", [*SECOND, FIRST])
def test_native_folders_give_the_same_logits(name, tmp_path):
    """To the bit, floats of 32 bits and floors included."""
    student, header = load_model(FIXTURES / name / "run")
    write_checkpoint(student, header, tmp_path / "x", text_source=FIXTURES / name / "base")
    again, _ = read_checkpoint(tmp_path / "x")
    assert torch.equal(logits(name, again)[0], logits(name, student)[0])


@pytest.mark.recipe
@pytest.mark.parametrize("name", SECOND)
def test_written_in_their_form_they_stay(name, tmp_path):
    """A student read and written is read again as the same."""
    student, _ = load_model(FIXTURES / name / "run")
    write_seed_checkpoint(student, tmp_path / "x.pt", model_id="base")
    again, _ = load_model(tmp_path / "x.pt", model_id=str(FIXTURES / name / "base"))
    assert worst(name, again) < TOLERANCE / 20
    stored = torch.load(tmp_path / "x.pt", weights_only=True)
    theirs = torch.load(FIXTURES / name / "run" / "best_state_dict.pt", weights_only=True)
    assert stored.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert (stored[key].shape, stored[key].dtype) == (tensor.shape, tensor.dtype), key
    assert all(torch.equal(stored[key], theirs[key]) for key in theirs if key.endswith("_indices"))


@pytest.mark.parametrize("name", SECOND)
def test_rank_by_rank_gives_their_logits(name):
    """Their forward, layer for layer: one matmul per rank."""
    student, _ = load_model(FIXTURES / name / "run")
    for layer_name, layer in quantized_layers(student).items():
        swap(student, layer_name, RankwiseLinear(layer))
    assert worst(name, student) < TOLERANCE


@pytest.mark.recipe
@pytest.mark.parametrize("output", ["q2_init.pt", "q2_init"])
def test_q4_to_q2_in_the_seeds_words(output, tmp_path, capsys):
    """Every flag of their script; the output opens in its form and measures as it said."""
    name = "v2_q4a4_qwen3"
    base = FIXTURES / name / "base"
    found = closing(
        "convert-q4-to-q2",
        *("--q4-checkpoint", FIXTURES / name / "run" / "best_state_dict.pt"),
        *("--output", tmp_path / output, "--model-id", base),
        *("--q4-rank", 4, "--q2-mlp-rank", 32, "--q2-attn-rank", 8),
        *("--q2-mlp-lut-size", 4, "--q2-attn-lut-size", 16),
        *("--eval", "--cache-dir", cache_of(name), "--device", "cpu", "--dtype", "fp32"),
        capsys=capsys,
    )
    expected = {
        *("checkpoint", "seconds", "peak_rss_bytes", "kl_nats_lower", "kd_loss"),
        *("bits_per_weight", "bits_per_weight_mlp", "bits_per_weight_model"),
    }
    assert expected <= found.keys()
    again = measured(found["checkpoint"], name, capsys, "--model-id", base)
    for key in ("kl_nats_lower", "kd_loss", *(key for key in expected if key.startswith("bits"))):
        assert again[key] == pytest.approx(found[key], rel=1e-3), key
    student, _ = load_model(found["checkpoint"], model_id=str(base))
    source, _ = load_model(FIXTURES / name / "run")
    for layer_name, layer in quantized_layers(student).items():
        expected = source.get_submodule(layer_name).fake_quantized_weight()
        if "self_attn" in layer_name:
            assert layer.spec.rank == 8
            error = (layer.fake_quantized_weight() - expected).abs().max()
            assert error < 1e-6 * expected.abs().max()
        else:
            assert (layer.spec.bits, layer.spec.rank) == (2, 32)
    if output.endswith(".pt"):
        assert read_json(tmp_path / "config.json")["config_preset"] == "q2a4"


@pytest.mark.recipe
def test_latent_weights_are_fitted_to(tmp_path, capsys):
    """Another latent weight gives another student, though the base model is the same."""
    name = "v2_q4a4_qwen3"
    state = torch.load(FIXTURES / name / "run" / "best_state_dict.pt", weights_only=True)
    key = "model.layers.0.mlp.gate_proj"
    state[f"{key}.weight"] = state[f"{key}.weight"] * 3
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / "x.pt")
    closing(
        "convert-q4-to-q2",
        *("--q4-checkpoint", tmp_path / "run" / "x.pt", "--output", tmp_path / "out"),
        *("--model-id", FIXTURES / name / "base"),
        capsys=capsys,
    )
    student, _ = load_model(tmp_path / "out")
    weight = student.get_submodule(key).fake_quantized_weight()
    latent = state[f"{key}.weight"]
    assert (weight - latent).square().sum() < 0.3 * latent.square().sum()


@pytest.mark.recipe
def test_the_first_form_becomes_the_second(tmp_path, capsys):
    """1,056 floored weights, and what they cost; every other weight stays to 1e-6."""
    found = closing(
        "convert-v1-to-v2",
        *("--v1-checkpoint", FIXTURES / FIRST / "run" / "model_state_dict.pt"),
        *("--output", tmp_path / "v2.pt", "--cache-dir", cache_of(FIRST)),
        capsys=capsys,
    )
    assert found["floored_weights"] == 1056
    assert abs(found["kl_nats_lower_cost"]) < 1e-3
    assert found["kl_nats_lower"] == pytest.approx(
        found["kl_nats_lower_before"] + found["kl_nats_lower_cost"]
    )
    before, _ = load_model(FIXTURES / FIRST / "run")
    after, _ = load_model(tmp_path / "v2.pt", model_id=str(FIXTURES / FIRST / "base"))
    for name, layer in quantized_layers(before).items():
        above = layer.full_scale() > layer.spec.floor
        error = layer.fake_quantized_weight() - after.get_submodule(name).fake_quantized_weight()
        assert error[above].abs().max() <= 1e-6


@pytest.mark.recipe
@pytest.mark.parametrize("name", SECOND)
def test_snapping_costs_little(name, tmp_path, capsys):
    """Less than a thousandth of a nat, told as kl_nats_lower_cost; half the bits for scales."""
    found = closing(
        "snap-fp16",
        *("--checkpoint", FIXTURES / name / "run", "--output", tmp_path / "snapped"),
        *("--cache-dir", cache_of(name)),
        capsys=capsys,
    )
    assert abs(found["kl_nats_lower_cost"]) < 1e-3
    before = measured(FIXTURES / name / "run", name, capsys)
    assert found["bits_per_weight"] < before["bits_per_weight"]
    again = measured(tmp_path / "snapped", name, capsys)
    assert again["kl_nats_lower"] == pytest.approx(found["kl_nats_lower"], abs=1e-7)


@pytest.mark.recipe
def test_other_doors_open_them(tmp_path, capsys):
    """Export takes the .pt file with its base model named."""
    name = SECOND[0]
    found = closing(
        "export",
        *("--checkpoint", FIXTURES / name / "run" / "best_state_dict.pt"),
        *("--model-id", FIXTURES / name / "base", "--to", "hf", "--output", tmp_path / "hf"),
        capsys=capsys,
    )
    assert found["exact"] is True
    exported, _ = load_model(tmp_path / "hf")
    assert worst(name, exported) < TOLERANCE / 20


def test_the_scripts_of_the_seeds_are_there():
    """Each is a command under the name that their notebooks type."""
    scripts = Path(__file__).parents[1] / "scripts"
    for name in ("convert_q4_to_q2", "convert_v1_to_v2"):
        assert (scripts / f"{name}.py").is_file()
        assert name.replace("_", "-") in PIPELINES


def test_a_header_of_theirs_is_a_header(tmp_path):
    """What is known of a checkpoint fits where ours is written."""
    _, header = load_model(FIXTURES / SECOND[0] / "run")
    assert isinstance(header, CheckpointHeader)
    assert len(header.base_model["weights"]) == len(header.sha256) == 16
