"""The script that quantizes and trains a model larger than memory, on one of next to no size."""

import runpy
from pathlib import Path

import pytest
from transformers import LlamaConfig

from qat.model.load import load_dense

pytestmark = pytest.mark.recipe
SCRIPT = Path(__file__).parents[2] / "speedrun" / "large.py"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_a_random_model_goes_through_a_process_of_each_command(tmp_path):
    """The folder is a model of as many layers as asked for; peak, seconds and bytes are told."""
    shape = LlamaConfig(vocab_size=300, num_hidden_layers=9, tie_word_embeddings=True, **SIZES)
    shape.save_pretrained(tmp_path / "shape")
    script = runpy.run_path(str(SCRIPT))
    config = script["LargeConfig"](
        output_dir=tmp_path / "made",
        arch=str(tmp_path / "shape"),
        layers=2,
        plans=("q4a4",),
        seq_len=64,
        device="cpu",
        dtype="fp32",
    )
    made = script["run_large"](config)
    model = load_dense(tmp_path / "made" / "model")
    assert len(model.get_decoder().layers) == 2
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    assert 2 * num_weights < made["model_bytes"] < 2 * num_weights + 20_000  # bfloat16, headers
    student = made["students"]["q4a4"]
    assert 4 < student["bits_per_weight"] < 5
    assert student["file_bytes"] < made["model_bytes"] < student["peak_rss_bytes"]
    assert 0 < student["seconds"] < student["wall_seconds"]
    stage, steps = made["train"]["layer-wise"], made["train"]["scales, formed in use"]
    assert (stage["steps"], steps["steps"], steps["tokens_seen"]) == (0, 2, 2 * 64)
    assert all(0 < one["seconds"] < one["wall_seconds"] for one in (stage, steps))
    assert not any((tmp_path / "made" / "students").iterdir())
    assert not (tmp_path / "made" / "run").exists()
