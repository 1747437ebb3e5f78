"""The same commands on XLA and on the CPU, each in a process of its own, and once more on XLA."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qat.tracking.record import read_rows
from tests.tiny import save_tiny, tiny_llama, tiny_records, write_jsonl

pytestmark = pytest.mark.xla
ROOT = Path(__file__).parent.parent.parent
# Runs `qat` with each list of words; prints exit code, standard output and standard error of each,
# and at last what XLA compiled.
RUNNER = """
import contextlib, io, json, sys
from qat.__main__ import main
done = []
for words in json.loads(sys.stdin.read()):
    sys.argv = ["qat", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main()
    done.append([code, out.getvalue(), err.getvalue()])
from tests.xla.counters import counted, happened
names = ("PersistentCacheMiss", "PersistentCacheHit", "PersistentCacheDeserializeFailure")
print(json.dumps([done, {"compiled": happened("CompileTime"), **{n: counted(n) for n in names}}]))
"""


def run_all(commands, folder):
    """Run commands; return each one's closing values, and XLA's counters."""
    result = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([[str(word) for word in words] for words in commands.values()]),
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_PERSISTENT_CACHE_PATH": str(folder.parent / "programs"),
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    done, counters = json.loads(result.stdout.splitlines()[-1])
    for name, (code, _, err) in zip(commands, done, strict=True):
        assert code == 0, f"{name}: {err[-2000:]}"
    closing = [json.loads(out.splitlines()[-1]) for _, out, _ in done]
    return dict(zip(commands, closing, strict=True)), counters


def commands_of(device):
    """Return the commands of the path, in order; they run in a folder of their own."""
    usual = ["--device", device, "--dtype", "fp32"]
    on_cache = ["--cache-dir", "caches/words", *usual]
    train = ["train", "--checkpoint", "runs/q2_init", "--layers", "mlp", "--max-steps", "6"]
    train += ["--batch-size", "4", "--intervals.log-steps", "1"]
    train += ["--optim.warmup-steps", "1", *on_cache]
    text = ["--text", "words.txt", "--seq-len", "16", "--teacher", "teacher", *usual]
    return {
        "doctor": ["doctor", "--device", device],
        "build-cache": ["build-cache", "--teacher", "teacher", "--data", "records.jsonl"]
        + ["--seq-len", "16", "--top-k", "8", "--batch-size", "4", "--output-dir", "caches"]
        + ["--name", "words", *usual],
        "init-student": ["init-student", "--model", "teacher", "--plan", "q4a4"]
        + ["--output", "runs/q4", *on_cache],
        "init-student moments": ["init-student", "--model", "teacher", "--plan", "q4a4"]
        + ["--fit", "moments", "--output", "runs/q4_moments", *on_cache],
        "convert": ["convert-q4-to-q2", "--q4-checkpoint", "runs/q4", "--eval"]
        + ["--output", "runs/q2_init", *on_cache],
        "train": [*train, "--output-dir", "runs/plain"],
        "train checkpointed": [*train, "--output-dir", "runs/checkpointed"]
        + ["--gradient-checkpointing"],
        "evaluate": ["evaluate", "--checkpoint", "runs/plain", *on_cache],
        "evaluate text": ["evaluate", "--checkpoint", "runs/plain", *text],
        "generate": ["generate", "--checkpoint", "runs/plain", "--prompt", "the cat"]
        + ["--max-new-tokens", "4", *usual],
    }


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """Return the path walked on each device, and a training run on XLA by a second process."""
    folder = tmp_path_factory.mktemp("walk")
    found = {}
    for device in ("cpu", "xla"):
        (folder / device).mkdir()
        save_tiny(folder / device / "teacher", tiny_llama())
        write_jsonl(folder / device / "records.jsonl", tiny_records())
        words = "the cat sees a red boat and two small birds " * 20
        (folder / device / "words.txt").write_text(words)
        found[device] = run_all(commands_of(device), folder / device)
    again = commands_of("xla")["train"]
    again[again.index("runs/plain")] = "runs/again"
    found["again"] = run_all({"train": again}, folder / "xla")
    return folder, found


def test_the_doctor_finds_nothing_wrong(walked):
    """The venv of this tier holds a pair that fits; XLA on the CPU has the host's memory."""
    _, found = walked
    seen = {device: found[device][0]["doctor"] for device in ("cpu", "xla")}
    assert [(name, values["kind"]) for name, values in seen.items()] == [
        ("cpu", "cpu"),
        ("xla", "xla"),
    ]
    assert all(values["ok"] and not values["mismatches"] for values in seen.values())
    assert seen["xla"]["memory_bytes"] == seen["cpu"]["memory_bytes"] > 0


def losses_of(run):
    """Return the logged losses of a run."""
    return [row["train/loss"] for row in read_rows(run) if "train/loss" in row]


def test_losses_are_those_of_the_cpu(walked):
    """Cache, students and steps made on XLA tell the same losses, to 1e-4."""
    folder, _ = walked
    runs = {
        (device, name): losses_of(folder / device / "runs" / name)
        for device in ("cpu", "xla")
        for name in ("plain", "checkpointed")
    }
    expected = runs["cpu", "plain"]
    assert len(set(expected)) == 6
    for name, losses in runs.items():
        assert losses == pytest.approx(expected, rel=1e-4), name


def test_measures_are_those_of_the_cpu(walked):
    """Every command's closing numbers of quality agree."""
    _, found = walked
    names = (
        "kl_nats",
        "kl_nats_lower",
        "kd_loss",
        "perplexity",
        "bits_per_weight_model",
        "best_kl_nats_lower",
    )
    for command, values in found["cpu"][0].items():
        for name in names:
            if values.get(name) is not None:
                other = found["xla"][0][command][name]
                assert other == pytest.approx(values[name], rel=1e-3), f"{command} {name}"
    answers = [found[device][0]["generate"]["answers"] for device in ("cpu", "xla")]
    assert answers[0] == answers[1]


def test_a_second_process_needs_no_program_that_the_first_did_not_keep(walked):
    """The same run elsewhere asks for the very programs that lie in the folder, and no other.

    torch_xla 2.9.0 cannot read back what it wrote (pytorch/xla#9094) and compiles those again; a
    release that can compiles nothing here.
    """
    folder, found = walked
    assert found["xla"][1]["PersistentCacheMiss"] > 0
    counters = found["again"][1]
    assert counters["PersistentCacheMiss"] == 0
    unreadable = counters["PersistentCacheDeserializeFailure"]
    assert counters["compiled"] == unreadable
    assert unreadable + counters["PersistentCacheHit"] > 0
    runs = folder / "xla" / "runs"
    assert losses_of(runs / "again") == losses_of(runs / "plain")


def test_the_benchmark_tells_compiling_from_stepping(walked):
    """Both configurations run in processes of their own; what compiles is not in the step."""
    folder, _ = walked
    words = ["benchmark", "--model-id", "teacher", "--batch-sizes", "2", "--seq-len", "16"]
    words += ["--output-dir", "runs/benchmark", "--device", "xla", "--dtype", "fp32"]
    found = run_all({"benchmark": words}, folder / "xla")[0]["benchmark"]
    assert [row["status"] for row in found["rows"]] == ["OK", "OK"]
    assert all(row["warm_up_seconds"] > 5 * row["step_seconds"] for row in found["rows"])
