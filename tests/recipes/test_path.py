"""The whole path by its real commands, in one process of its own, twice.

Arithmetic is pinned to what every x86 processor computes alike, so that the numbers can be compared
with recorded ones (`golden/path.json`; `QAT_GOLDEN=write` records them anew).
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qat.pipelines.open_checkpoint import load_model
from qat.storage.files import write_json
from qat.tracking.record import read_rows
from tests.tiny import tiny_records, write_jsonl

pytestmark = pytest.mark.recipe
ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "golden" / "path.json"
PINNED = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
# Makes the teacher, whose random weights depend on arithmetic too, and runs `qat` with each list
# of words; prints exit code, standard output and standard error of each.
RUNNER = """
import contextlib, io, json, sys
from qat.__main__ import main
from tests.tiny import save_tiny, tiny_llama
save_tiny("teacher", tiny_llama())
done = []
for words in json.loads(sys.stdin.read()):
    sys.argv = ["qat", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main()
    done.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""


def run_all(commands, folder):
    """Run commands as at a terminal; return exit code, closing values and words of each."""
    result = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([[str(word) for word in words] for words in commands]),
        env={**os.environ, **PINNED, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [
        (code, json.loads(out.splitlines()[-1]) if out else None, err)
        for code, out, err in json.loads(result.stdout)
    ]


def commands_of(cache):
    """Return the commands of the path, in order; they run in a folder of their own."""
    usual = ["--device", "cpu", "--dtype", "fp32"]
    on_cache = ["--cache-dir", cache]
    quick = [*on_cache, "--fit", "moments", *usual]
    text = ["--text", "words.txt", "--seq-len", "16", "--teacher", "teacher", *usual]
    return {
        "build-cache": ["build-cache", "--teacher", "teacher", "--data", "records.jsonl"]
        + ["--seq-len", "16", "--top-k", "8", "--batch-size", "4", "--output-dir", "caches"]
        + ["--name", "words", *usual],
        "init-student": ["init-student", "--model", "teacher", "--plan", "q4a4"]
        + ["--output", "runs/q4", *quick],
        "convert-q4-to-q2": ["convert-q4-to-q2", "--q4-checkpoint", "runs/q4", "--eval"]
        + ["--output", "runs/q2_init", *quick],
        "train": ["train", "--checkpoint", "runs/q2_init", "--output-dir", "runs/q2_mlp"]
        + [
            "--layers",
            "mlp",
            "--optim.lr",
            "4e-4",
            "--max-steps",
            "4",
            "--batch-size",
            "4",
            "--intervals.log-steps",
            "1",
        ]
        + ["--optim.warmup-steps", "1", *on_cache, *usual],
        "evaluate": ["evaluate", "--checkpoint", "runs/q2_mlp", *on_cache, *usual],
        "evaluate text": ["evaluate", "--checkpoint", "runs/q2_mlp", *text],
        "generate": ["generate", "--checkpoint", "runs/q2_mlp", "--prompt", "the cat"]
        + ["--max-new-tokens", "8", *usual],
        "export": ["export", "--checkpoint", "runs/q2_mlp", "--to", "hf", "--output", "runs/hf"],
        "compare": ["compare", "runs/q4", "runs/q2_init", "runs/q2_mlp", "--output", "runs/table"],
    }


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The path walked once, and the same commands again."""
    folder = tmp_path_factory.mktemp("walk")
    write_jsonl(folder / "records.jsonl", tiny_records())
    (folder / "words.txt").write_text("the cat sees a red boat and two small birds " * 20)
    commands = commands_of("caches/words")
    done = run_all([*commands.values(), *commands.values()], folder)
    first, second = done[: len(commands)], done[len(commands) :]
    return (
        folder,
        dict(zip(commands, first, strict=True)),
        dict(zip(commands, second, strict=True)),
    )


def test_every_command_of_the_path_ends_well(walked):
    """Exit code 0 and one closing line each."""
    _, first, _ = walked
    for name, (code, closing, said) in first.items():
        assert code == 0, f"{name}: {said[-1000:]}"
        assert isinstance(closing, dict)


def test_each_stage_is_where_it_should_be(walked):
    """Fewer bits are further away, and training comes nearer."""
    _, first, _ = walked
    closing = {name: values for name, (_, values, _) in first.items()}
    q4, q2, trained = (closing[name] for name in ("init-student", "convert-q4-to-q2", "evaluate"))
    assert q4["kl_nats_lower"] < trained["kl_nats_lower"] < q2["kl_nats_lower"]
    assert q2["bits_per_weight_mlp"] == trained["bits_per_weight_mlp"] < 2.6
    assert closing["train"]["best_kl_nats_lower"] == pytest.approx(
        trained["kl_nats_lower"], rel=1e-6
    )
    assert closing["evaluate text"]["kl_nats"] > 0
    assert len(closing["compare"]["runs"]) == 3


def test_a_second_walk_makes_nothing_anew(walked):
    """Stages are found by what decided them; the export does not replace what is there."""
    folder, first, second = walked
    for name in ("build-cache", "init-student", "convert-q4-to-q2", "train"):
        code, closing, said = second[name]
        assert code == 0
        assert "nothing to do" in said
        rates = {"tokens_per_second", "bare_forward_tokens_per_second"} - (
            {"tokens_per_second"} if name == "train" else set()
        )
        same = {key: value for key, value in first[name][1].items() if key not in rates}
        assert {key: closing[key] for key in same} == same
    for name in ("evaluate", "evaluate text", "compare"):
        assert second[name][1] == first[name][1]
    assert second["generate"][1]["answers"] == first["generate"][1]["answers"]
    assert second["export"][:2] == first["export"][:2]
    assert "nothing to do" in second["export"][2]
    assert (folder / "runs" / "hf" / "model.safetensors").is_file()


def test_the_export_needs_nothing_of_ours(walked):
    """Plain transformers gives the student's logits, and answers a prompt."""
    folder, _, _ = walked
    student, header = load_model(folder / "runs" / "q2_mlp")
    assert header is not None
    model = AutoModelForCausalLM.from_pretrained(folder / "runs" / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder / "runs" / "hf")
    ids = tokenizer("the cat sees", return_tensors="pt")["input_ids"]
    assert torch.allclose(model(ids).logits, student(ids).logits, rtol=0, atol=1e-5)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]


def recorded(walked):
    """Return the numbers that are compared with recorded ones."""
    folder, first, _ = walked
    rows = read_rows(folder / "runs" / "q2_mlp")
    return {
        "kl_nats_lower": {
            "q4": first["init-student"][1]["kl_nats_lower"],
            "q2_init": first["convert-q4-to-q2"][1]["kl_nats_lower"],
            "q2_trained": first["evaluate"][1]["kl_nats_lower"],
        },
        "losses": [row["train/loss"] for row in rows if "train/loss" in row],
        "grad_norms": [row["train/grad_norm"] for row in rows if "train/grad_norm" in row],
    }


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="numbers are recorded on x86 processors"
)
def test_numbers_are_the_recorded_ones(walked):
    """Held-out distances, losses and gradient norms to 1e-6: nothing drifts unnoticed."""
    found = recorded(walked)
    if os.environ.get("QAT_GOLDEN") == "write":
        write_json(GOLDEN, found)
    wanted = json.loads(GOLDEN.read_text())
    assert len(wanted["losses"]) == 4
    assert found["kl_nats_lower"] == pytest.approx(wanted["kl_nats_lower"], rel=1e-6)
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
    assert found["grad_norms"] == pytest.approx(wanted["grad_norms"], rel=1e-5)
