"""Processes killed for real, in the middle of whatever they do, and started again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from qat.cli.commands import main
from qat.model.checkpoint import read_checkpoint
from qat.storage.files import sha256_of_file
from qat.tracking.record import read_rows
from tests.tiny import save_tiny, tiny_cache, tiny_llama, tiny_records, write_jsonl

pytestmark = pytest.mark.recipe
ROOT = Path(__file__).parent.parent.parent
STEPS = 40
USUAL = ["--device", "cpu", "--dtype", "fp32"]
TIMES = ("train/seconds", "train/tokens_per_second")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """The flags of a run that saves its state at every step, so that a kill hits a write."""
    folder = tmp_path_factory.mktemp("made")
    cache = tiny_cache(folder, tiny_llama())
    quick = ["--cache-dir", str(cache), "--fit", "moments", *USUAL]
    q4, q2 = str(folder / "q4"), str(folder / "q2")
    made = [
        main("init-student", ["--model", str(folder / "teacher"), "--output", q4, *quick]),
        main("convert-q4-to-q2", ["--q4-checkpoint", q4, "--output", q2, *quick]),
    ]
    assert made == [0, 0]
    return ["--checkpoint", q2, "--cache-dir", str(cache), "--max-steps", str(STEPS)] + [
        *("--batch-size", "2", "--intervals.log-steps", "1", "--intervals.save-steps", "1"),
        *("--intervals.eval-steps", "5"),
        *("--trainable", "weights", "scales", "codebooks", "norms", *USUAL),
    ]


def start(command, *flags):
    """Start a command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "qat", command, *map(str, flags)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_when(process, has_come):
    """Kill a process, as the system does, as soon as something has come to be."""
    reader = threading.Thread(target=process.communicate)  # a full pipe would hold it up
    reader.start()
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline:
        if has_come():
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    reader.join()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"


def is_past(folder, step):
    """Return whether a run's record tells of a step."""
    rows = read_rows(folder)
    return bool(rows) and rows[-1]["step"] >= step


def rows_of(folder):
    """Return the rows of a run without what the clock says."""
    return [
        {name: value for name, value in row.items() if name not in TIMES}
        for row in read_rows(folder)
    ]


def test_a_killed_run_ends_like_one_that_was_not(flags, tmp_path):
    """Killed twice with SIGKILL: the same rows, the same bytes of both students."""
    assert main("train", [*flags, "--output-dir", str(tmp_path / "straight")]) == 0
    folder = tmp_path / "killed"
    for step in (6, 22):
        process = start("train", *flags, "--output-dir", folder)
        kill_when(process, partial(is_past, folder, step))
        for name in ("best", "final"):  # what was complete is still whole
            if (folder / name / "checkpoint.json").is_file():
                read_checkpoint(folder / name)
    process = start("train", *flags, "--output-dir", folder)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-2000:]
    closing = json.loads(out)
    assert closing["steps"] == STEPS
    assert "resuming from step" in err
    assert rows_of(folder) == rows_of(tmp_path / "straight")
    for name in ("best", "final"):
        sums = [
            sha256_of_file(run / name / "student.safetensors")
            for run in (folder, tmp_path / "straight")
        ]
        assert sums[0] == sums[1]


def test_a_file_killed_in_each_of_its_stages_is_the_same_in_the_end(tmp_path):
    """While text is cached, after each of what it makes, in training, before it is measured."""
    model = save_tiny(tmp_path / "model", tiny_llama())
    data = write_jsonl(tmp_path / "data.jsonl", tiny_records(200))
    output, work = tmp_path / "file.gguf", tmp_path / "file.gguf.work"
    flags = ["--model", model, "--data", data, "--output", output, "--size", "52KB", *USUAL]
    flags += ["--minutes", "0.5", "--num-sequences", "96", "--seq-len", "32"]
    process = start("compress", *flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    straight, before = json.loads(out), sha256_of_file(output)
    output.unlink()
    for path in work.iterdir():
        if path.name not in ("steps", "sequences.json", "fit_tokens"):  # matters of time
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    stages = ["cache/*", "costs.json", "plans/*", "students/*", "runs/*/metrics.jsonl"]
    for made in [*stages, "runs/*/state*", f"../{output.name}"]:
        kill_when(start("compress", *flags), lambda made=made: any(work.glob(made)))
    process = start("compress", *flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    assert sha256_of_file(output) == before
    clock = ("seconds", "peak_rss_bytes")
    again = json.loads(out)
    assert {k: v for k, v in again.items() if k not in clock} == {
        k: v for k, v in straight.items() if k not in clock
    }
