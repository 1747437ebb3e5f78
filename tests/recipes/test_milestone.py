"""From Python's own documentation to GGUF files, with a model of a million parameters."""

import runpy
from pathlib import Path

import pytest
from transformers import LlamaConfig

from qat.tracking.record import read_rows
from tests.tiny import quick_fits

pytestmark = pytest.mark.recipe
SCRIPT = Path(__file__).parents[2] / "speedrun" / "milestone.py"
ROWS = 600
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def config_of(script, folder, **changes):
    """Return settings that take seconds."""
    shape = LlamaConfig(vocab_size=ROWS, tie_word_embeddings=True, **SIZES)
    shape.save_pretrained(folder / "shape")
    return script["MilestoneConfig"](
        output_dir=folder / "made",
        arch=str(folder / "shape"),
        vocab_size=ROWS,
        seq_len=64,
        batch_size=4,
        steps=6,
        student_steps=2,
        sequences=24,
        documents=60,
        device="cpu",
        dtype="fp32",
        **changes,
    )


def test_the_path_from_text_to_files(tmp_path):
    """Perplexity falls, fewer bits are smaller and further away; a second call makes nothing."""
    script = runpy.run_path(str(SCRIPT))
    config = config_of(script, tmp_path)
    with quick_fits():
        made = script["run_milestone"](config)
    rows = read_rows(config.output_dir / "pretrain")
    measured = [row["eval/perplexity"] for row in rows if "eval/perplexity" in row]
    assert measured[0] > measured[-1]
    assert [row["file"] for row in made["files"]] == [
        "f16.gguf",
        "q4_0.gguf",
        "iq3_s.gguf",
        "tq2_0.gguf",
    ]
    sizes, distances = ([row[name] for row in made["files"]] for name in ("bytes", "kl_nats"))
    assert sizes == sorted(sizes, reverse=True)
    assert distances == sorted(distances)
    before = {path: path.stat().st_mtime_ns for path in config.output_dir.rglob("*.safetensors")}
    assert script["run_milestone"](config)["files"] == made["files"]
    assert before == {path: path.stat().st_mtime_ns for path in before}
