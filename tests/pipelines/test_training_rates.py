"""Rates of training on a tiny model: every number is there, on a machine that has little."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qat.pipelines.training_rates import RatesConfig, batch_sizes, measure_training, table

ROOT = Path(__file__).parents[2]
MISSING = ("msgspec", "tyro", "rich", "lz4", "datasets", "sklearn", "gguf", "matplotlib", "wandb")


def test_batches_double_up_to_the_most_tokens():
    """One at least, also of blocks longer than a step may be."""
    assert list(batch_sizes(64, 1024)) == [16]
    assert list(batch_sizes(64, 2**14)) == [64, 128, 256]
    assert list(batch_sizes(4096, 512)) == [1]


@pytest.mark.recipe
def test_every_rate_is_measured():
    """Of both kinds of training, at a length that fits and one beyond the most tokens."""
    config = RatesConfig(
        device="cpu", shape="tiny", lengths=(16, 64), compile=("off",), most_tokens=32
    )
    values = measure_training(config)
    assert [(row["seq_len"], row["mode"]) for row in values["rows"]] == [
        (16, "mlp"),
        (16, "e2e"),
        (64, "mlp"),
        (64, "e2e"),
    ]
    for row in values["rows"]:
        assert row["best_batch"] == row["max_batch"] == (2 if row["seq_len"] == 16 else 1)
        assert row["tokens_per_second"] > 0
        assert row["mfu"] is None
    assert values["step_over_plain"]["off"] > 0
    assert values["cache"]["top_k_tokens_per_second"] > 0
    assert values["fit_seconds"] > 0
    assert table(values).count("| L16 |") == 2


@pytest.mark.recipe
def test_the_script_needs_torch_and_transformers_alone(tmp_path):
    """Whatever else the project uses is not to be found; the last line is JSON."""
    for name in MISSING:
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on this machine')")
    flags = ["--device", "cpu", "--shape", "tiny", "--lengths", "16", "--most-tokens", "32"]
    done = subprocess.run(
        [sys.executable, "speedrun/gpu.py", *flags, "--compile", "off", "--skip-tests"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["tests"] is None
    assert len(values["rows"]) == 2
    assert "step over plain fine-tuning" in done.stderr
