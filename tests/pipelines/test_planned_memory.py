"""What memory is predicted, against what students and processes hold."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qat.model.head import hidden_states
from qat.model.surgery import dense_weights
from qat.pipelines.planned_memory import (
    ModelSizes,
    Situation,
    activation_bytes,
    predict_memory,
    student_bytes,
)
from tests.tiny import plan_of, tiny_llama, tiny_student

ROOT = Path(__file__).parents[2]
FP32 = Situation(dtype=torch.float32, batch_size=4, seq_len=16, has_process=False)


@pytest.mark.parametrize("plan", ["q2a4, embed=int4-g32", "q4a4_r4", "deploy"])
def test_a_student_has_the_bytes_that_are_predicted(plan):
    """Indices, scales, codebooks and what stays dense, tied tensors once."""
    sizes = ModelSizes.of(tiny_llama(), plan_of(tiny_llama(), plan))
    student = tiny_student(plan=plan)
    held = {
        id(tensor): tensor.numel() * tensor.element_size()
        for tensor in student.state_dict(keep_vars=True).values()
    }
    assert student_bytes(sizes, FP32) == sum(held.values())


def test_activations_are_what_autograd_keeps():
    """Of each token in the decoder layers, weights left out; norms do not train."""
    model = tiny_llama()
    for linear in dense_weights(model, plan_of(model)).values():
        linear.weight.requires_grad_()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(FP32.batch_size, FP32.seq_len, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = hidden_states(model, ids)
    assert hidden.requires_grad
    predicted = activation_bytes(ModelSizes.of(model, plan_of(model)), FP32)
    assert predicted == pytest.approx(sum(kept.values()), rel=0.1)


def test_what_takes_less_is_predicted_to():
    """More processes that split weights, recomputed activations, fewer bytes of the dtype."""
    sizes = ModelSizes.of(tiny_llama(), plan_of(tiny_llama()))

    def train(**changes):
        return predict_memory(sizes, replace(FP32, **changes))["train"]

    split = [train(num_processes=count, is_split=True) for count in (2, 4)]
    assert train(num_processes=2) > split[0] > split[1]
    long = {"batch_size": 64, "seq_len": 64}
    assert train(**long, recomputes=True) < train(**long)
    assert train(dtype=torch.bfloat16) < train()
    both = predict_memory(sizes, FP32)
    assert both["train scales, formed in use"] < both["train, 8-bit averages"] < both["train"]


# Each command in a fork of a process that has loaded what they need and holds no model.
CHILD = """
import json, os, sys
from importlib.util import find_spec
from pathlib import Path
import torch
import qat
from qat.model.checkpoint import empty_model
from qat.model.surgery import model_tensors
from qat.pipelines.planned_memory import ModelSizes, Situation, predict_memory
from qat.quant.plan import read_plan
from qat.runtime.device import Device
from qat.runtime.memory import host_bytes, peak_rss_bytes
from tests.tiny import quick_fits, tiny_cache, tiny_llama

PLACE = {"device": "cpu", "dtype": "fp32"}
SHAPES = json.loads(sys.argv[2])

def commands(folder):
    cache = next((one.parent for one in folder.glob("cache/*/manifest.json")), None)
    train = {**PLACE, "max_steps": 3, "intervals": {"save_steps": 2, "eval_steps": 0}}
    found = {
        "build-cache": lambda: qat.build_cache(
            folder / "teacher", folder / "records.jsonl", seq_len=16, top_k=8, batch_size=64,
            output_dir=folder / "cache", **PLACE
        ),
        "quantize": lambda: qat.quantize(
            folder / "teacher", "q2a4", cache=cache, output=folder / "s", fit="moments",
            eval=False, **PLACE
        ),
        "evaluate": lambda: qat.evaluate(folder / "s", cache=cache, **PLACE),
        "train": lambda: qat.train(
            folder / "s", cache, output_dir=folder / "r", batch_size=8, **train
        ),
        "layer-wise": lambda: qat.train(
            folder / "s", cache, output_dir=folder / "l", batch_size=8, max_steps=0,
            layerwise={"sequences": 16, "epochs": 1}, **PLACE
        ),
        "pretrain": lambda: new_model(folder),
        "train scales, formed in use": lambda: qat.train(
            folder / "s", cache, output_dir=folder / "u", batch_size=8, trainable=("scales",),
            gradient_checkpointing=True, form_weights="in-use", **train
        ),
    }
    if find_spec("torchao") is None:
        return found
    small = {**train, "optim": {"averages": "8bit"}}
    return found | {
        "train, 8-bit averages": lambda: qat.train(
            folder / "s", cache, output_dir=folder / "r8", batch_size=8, **small
        )
    }

def new_model(folder):
    from qat.pipelines.pretrain import pretrain
    from qat.train.config import IntervalsConfig
    from qat.train.pretrain_config import PretrainConfig
    pretrain(
        PretrainConfig(
            arch=str(folder / "teacher"), data_dir=folder / "shards", output_dir=folder / "p",
            seq_len=16, batch_size=8, max_steps=3,
            intervals=IntervalsConfig(save_steps=2, eval_steps=0), **PLACE
        )
    )

def in_fork(work):
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        with os.fdopen(reader) as file:
            said = file.read()
        os.waitpid(child, 0)
        return json.loads(said)
    before = resident()
    work()
    os.write(writer, json.dumps([before, peak_rss_bytes()]).encode())
    os._exit(0)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def make(folder, shape):
    from tests.tiny import save_tiny, tiny_records, tiny_shards, write_jsonl
    tiny_shards(folder)
    save_tiny(folder / "teacher", tiny_llama(**shape, initializer_range=0.02))
    write_jsonl(folder / "records.jsonl", tiny_records(24))

root = Path(sys.argv[1])
with quick_fits():
    Device.detect("cpu")
    make(root / "warm", {})
    for name in commands(root / "warm"):
        commands(root / "warm")[name]()
    for number, shape in enumerate(SHAPES):
        folder, found = root / str(number), {}
        in_fork(lambda: make(folder, shape))
        for name in commands(folder):
            found[name] = in_fork(commands(folder)[name])
        model = empty_model(folder / "teacher", device="meta")
        sizes = ModelSizes.of(model, read_plan("q2a4", model_tensors(model)))
        there = Situation(
            dtype=torch.float32, batch_size=8, seq_len=16, total_bytes=host_bytes(),
            has_process=False, keeps_states=True,
        )
        print(json.dumps([found, predict_memory(sizes, there)]), flush=True)
"""
SHAPES = [  # more take minutes; four layers of 384 and three of 768 are within OFF as well
    {"num_hidden_layers": 5, "hidden_size": 512, "intermediate_size": 1536, "vocab_size": 2048}
]
OFF = 0.1


@pytest.mark.recipe
def test_processes_hold_what_is_predicted(tmp_path):
    """The peak of each command on a small model, on top of what the process held before."""
    lines = measure(tmp_path, SHAPES)
    assert len(lines) == len(SHAPES)
    for found, predicted in lines:
        expected = {name: before + predicted[name] for name, (before, _) in found.items()}
        assert {name: peak for name, (_, peak) in found.items()} == pytest.approx(expected, rel=OFF)


def measure(folder, shapes):
    """Return measured and predicted bytes of each command, a pair a shape."""
    said = subprocess.check_output(
        [sys.executable, "-c", CHILD, str(folder), json.dumps(shapes)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    return [json.loads(line) for line in said.splitlines() if line.startswith(b"[{")]
