"""Students made layer by layer: those of the whole model to the bit, in the memory of a layer."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qat
from qat.model.checkpoint import student_tensors
from qat.model.layered import NeedsWhole
from qat.model.load import load_dense
from qat.pipelines import quantize
from tests.tiny import quick_fits, save_tiny, tiny_cache, tiny_llama, tiny_model

ROOT = Path(__file__).parents[2]
CASES = [
    ("llama", True, "q2a4, embed=int4-g32"),
    ("llama", False, "q4a4_r4, head=lut3-g32"),
    ("qwen2", True, "deploy"),  # biases stay dense
    ("gemma3", True, "q2a4, layers.0.*=f16"),
]


def files_of(folder):
    """Return the bytes of a student's files but for the summaries, which hold seconds."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix == ".safetensors"} | {
        "config.json": (folder / "config.json").read_bytes()
    }


@pytest.mark.recipe
@pytest.mark.parametrize("fit", [{"fit": "moments"}, {"fit": "hessian", "turns": False}])
@pytest.mark.parametrize(("family", "tied", "plan"), CASES)
def test_a_student_is_that_of_the_whole_model(family, tied, plan, fit, tmp_path, monkeypatch):
    """Its files to the bit, and what is measured of it."""
    cache = tiny_cache(tmp_path, tiny_model(family, tied=tied))
    settings = {"cache": cache, **fit, "device": "cpu", "dtype": "fp32"}
    made = []
    with quick_fits():
        for name in ("layered", "whole"):
            made.append(
                qat.quantize(tmp_path / "teacher", plan, output=tmp_path / name, **settings)
            )
            monkeypatch.setattr(quantize, "open_layered", refuse)
    assert files_of(made[0].checkpoint) == files_of(made[1].checkpoint)
    numbers = [
        {key: value for key, value in one.metrics.items() if key not in ("seconds", RSS)}
        for one in made
    ]
    assert numbers[0] == numbers[1]


RSS = "peak_rss_bytes"


def refuse(*_args):
    raise NeedsWhole("it is asked for as a whole")


@pytest.mark.recipe
def test_a_model_that_is_large_for_the_memory_is_fitted_without_turns(
    tmp_path, monkeypatch, caplog
):
    """Which is said; the student is that of `--no-turns`."""
    cache = tiny_cache(tmp_path, tiny_llama())
    settings = {"cache": cache, "fit": "hessian", "device": "cpu", "dtype": "fp32"}
    plan, made = "gguf:q4_0", []
    with quick_fits():
        monkeypatch.setattr(quantize, "WHOLE_SHARE", 0)
        with caplog.at_level("INFO"):
            made.append(qat.quantize(tmp_path / "teacher", plan, output=tmp_path / "b", **settings))
        assert "fitted layer by layer, without --turns" in caplog.text
        settings["turns"] = False
        made.append(qat.quantize(tmp_path / "teacher", plan, output=tmp_path / "c", **settings))
    assert files_of(made[0].checkpoint) == files_of(made[1].checkpoint)


@pytest.mark.recipe
def test_a_student_in_the_form_of_the_seeds_has_its_values(tmp_path):
    """It keeps latent weights as well, so it is written from a whole student."""
    save_tiny(tmp_path / "m", tiny_llama())
    with quick_fits():
        made = [
            qat.quantize(tmp_path / "m", "q2a4_r4", output=tmp_path / name, device="cpu")
            for name in ("s.pt", "s")
        ]
    from qat.pipelines.open_checkpoint import load_model

    seed, native = (
        load_model(str(one.checkpoint), model_id=str(tmp_path / "m"))[0] for one in made
    )
    found, expected = student_tensors(seed), student_tensors(native)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# A warm-up on one layer first: what libraries load when they are first used is counted before.
CHILD = """
import json, sys
import qat
from qat.runtime.memory import peak_rss_bytes
from tests.tiny import quick_fits
peaks = []
with quick_fits():
    for model in sys.argv[1:]:
        settings = {"cache": f"{model}/cache", "fit": "moments", "eval": False}
        qat.quantize(f"{model}/teacher", "q4a4", output=f"{model}/s", device="cpu", **settings)
        peaks.append(peak_rss_bytes())
print(json.dumps(peaks))
"""
LAYERS = 10
MOST_LAYERS = 4  # what more is held than of a model of one layer, in the bytes of one in float32


@pytest.mark.recipe
def test_memory_is_that_of_a_few_layers(tmp_path):
    """Ten decoder layers are quantized in the memory of one and the packed student."""
    for count in (1, LAYERS):
        model = tiny_llama(
            num_hidden_layers=count, hidden_size=512, intermediate_size=1536, initializer_range=0.02
        )
        cache = tiny_cache(tmp_path / f"{count}", model)
        cache.rename(tmp_path / f"{count}" / "cache")
    layer_bytes = 4 * sum(p.numel() for p in model.get_decoder().layers[0].parameters())
    del model
    said = subprocess.check_output(
        [sys.executable, "-c", CHILD, *(str(tmp_path / f"{n}") for n in (1, LAYERS))],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    one, many = json.loads(said.splitlines()[-1])
    student = (tmp_path / f"{LAYERS}" / "s" / "student.safetensors").stat().st_size
    assert many - one < MOST_LAYERS * layer_bytes + student


def test_a_weight_of_another_shape_is_told_as_the_loader_tells_it(tmp_path):
    """The format's check of each weight reads it first, and names what that says."""
    folder = save_tiny(tmp_path / "teacher", tiny_llama())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(ValueError) as told:  # noqa: PT011 whatever that says
        load_dense(folder)
    with pytest.raises(ValueError, match=re.escape(str(told.value))):
        qat.quantize(folder, "q4a4", output=tmp_path / "student", device="cpu")
