"""The real command, its processes and a real limit, on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import save_tiny, tiny_llama

pytestmark = pytest.mark.recipe
ROOT = Path(__file__).parent.parent.parent
LIMIT_GB = 1.0


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A model whose logits are wide, so that a sequence takes megabytes."""
    folder = tmp_path_factory.mktemp("wide") / "teacher"
    return save_tiny(folder, tiny_llama(vocab_size=4096, hidden_size=256, intermediate_size=1024))


def benchmark(folder, teacher, *words):
    """Run the script; return it ended."""
    flags = ["--model-id", str(teacher), "--device", "cpu", "--dtype", "fp32", "--seq-len", "64"]
    return subprocess.run(
        [sys.executable, "speedrun/benchmark.py", *flags, "--output-dir", str(folder), *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_largest_batch_under_a_limit(tmp_path, teacher):
    """It fits, the next size up does not, in few probes; a second call measures nothing."""
    words = ("--find-max-batch", "--memory-limit", str(LIMIT_GB), "--skip-checkpointing")
    done = benchmark(tmp_path / "out", teacher, *words)
    assert done.returncode == 0, done.stderr
    closing = json.loads(done.stdout)
    rows = {row["batch"]: row for row in closing["rows"]}
    largest = closing["max_batch"]
    assert largest % 8 == 0
    assert rows[largest]["status"] == "MAX"
    assert rows[largest]["peak_bytes"] <= LIMIT_GB * 1e9
    assert rows[largest + 8]["status"] == "OOM"
    assert closing["probes"] <= 10  # 8 on an idle machine: a neighbour moves peaks by a few MB
    assert closing["best_batch"] in rows
    assert closing["tokens_per_second"] > 0
    assert Path(closing["plot"]).read_bytes().startswith(b"\x89PNG")
    assert "Status" in done.stderr
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "probes").iterdir()}
    assert len(before) == closing["probes"]
    again = benchmark(tmp_path / "out", teacher, *words)
    assert json.loads(again.stdout)["rows"] == closing["rows"]
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "probes").iterdir()}
    assert after == before
    assert not list((tmp_path / "out").glob(".probe.*"))


@pytest.mark.parametrize("more", [(), ("--shard",)])
def test_processes_share_a_batch(tmp_path, teacher, more):
    """A row is of all of them; what does not fit in one of them is told as such."""
    words = ("--processes", "2", "--skip-checkpointing", "--steps", "1", *more)
    done = benchmark(tmp_path / "out", teacher, *words, "--batch-sizes", "4")
    assert done.returncode == 0, done.stderr
    closing = json.loads(done.stdout)
    (row,) = closing["rows"]
    assert (row["batch"], row["status"]) == (4, "OK")
    assert closing["device"].startswith("2 x cpu")
    assert row["tokens_per_second"] == pytest.approx(4 * 64 / row["step_seconds"])
    if more:
        return
    large = benchmark(
        tmp_path / "l", teacher, *words, "--batch-sizes", "4", "--memory-limit", "0.5"
    )
    assert large.returncode == 2
    assert "error: batch 4 does not fit: out of memory" in large.stderr


def test_a_limit_below_the_program_itself_is_told(tmp_path, teacher):
    """No batch fits: one line, with the remedy."""
    done = benchmark(tmp_path / "out", teacher, "--batch-sizes", "1", "--memory-limit", "0.1")
    assert done.returncode == 2
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: batch 1 does not fit: out of memory")
    assert "raise --memory-limit" in last
