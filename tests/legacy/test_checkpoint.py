"""The seeds' checkpoints mean here what they mean there, and what is not theirs is refused."""

import pytest
import torch

from qat.model.checkpoint import (
    CheckpointHeader,
)
from qat.pipelines.open_checkpoint import (
    load_model,
)
from tests.seeds import close, make_v2

GATE = "model.layers.0.mlp.gate_proj"
QUERY = "model.layers.1.self_attn.q_proj"


def test_nested_state_dicts_carry_their_config(tmp_path):
    """Their converter of the first form writes {model_state_dict, config} and no config.json."""
    made = make_v2(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"model_state_dict": made.state, "config": made.config}, folder / "v2.pt")
    student, _ = load_model(folder / "v2.pt")
    assert close(student, made.expected)


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
    assert close(student, made.expected)
    made.state[f"{GATE}.lora_B"][0, 0] = 1
    with pytest.raises(ValueError, match=r"gate_proj\.lora_B is a recovery adapter"):
        load_model(made.write(tmp_path / "run"))


def test_other_files_are_refused_in_one_line(tmp_path):
    """A pickled object, a cut file, a state dict of no quantized model, text."""
    file = tmp_path / "x.pt"
    torch.save({"model": CheckpointHeader(plan={}, base_model={})}, file)
    with pytest.raises(ValueError, match="cannot be read .*tensors"):
        load_model(file)
    made = make_v2(tmp_path)
    whole = made.write(tmp_path / "run")
    file.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read .*tensors"):
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
