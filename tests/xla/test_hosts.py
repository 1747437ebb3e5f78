"""Hosts of several chips each, by the line that starts them: the run of one process on one chip."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qat.tracking.record import read_rows
from tests.tiny import quantize_plainly, save_student, save_tiny, tiny_cache, tiny_llama

pytestmark = pytest.mark.xla
ROOT = Path(__file__).parent.parent.parent
HOSTS, STEPS = 2, 6
CLOSE = 1e-5  # nats between the losses of one process and those of several


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache and a student whose embedding, tied to the head, is quantized as well."""
    folder, plan = tmp_path_factory.mktemp("made"), "q2a4, embed=int4-g32"
    cache = tiny_cache(folder, tiny_llama())
    save_tiny(folder / "teacher", tiny_llama())
    student = quantize_plainly(tiny_llama(), plan)
    base = {"path": str(folder / "teacher"), "name": "teacher", "weights": None}
    save_student(folder / "student", student, folder / "teacher", plan=plan, base_model=base)
    return folder / "student", cache


def run_together(commands, folder):
    """Run commands beside each other; return status, output and errors of each.

    By files: a pipe that nobody reads holds up its writer, and the others with it.
    """
    folder.mkdir()
    outputs, errors = ([folder / f"{kind}{i}" for i in range(len(commands))] for kind in "oe")
    processes = []
    for (words, environment), output, error in zip(commands, outputs, errors, strict=True):
        with output.open("w") as out, error.open("w") as err:
            processes.append(
                subprocess.Popen(
                    list(map(str, words)), cwd=ROOT, env=environment, stdout=out, stderr=err
                )
            )
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.terminate()  # so that torchrun ends what it started
    return list(
        zip(
            codes,
            [path.read_text() for path in outputs],
            [path.read_text() for path in errors],
            strict=True,
        )
    )


def environment(**more):
    """Return that of a process on chips of the CPU."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "QAT_PYTHON": sys.executable,
        "PJRT_DEVICE": "CPU",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def run_hosts(words, folder, *, chips):
    """Run a command on all hosts of a slice, which lie on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slice_of = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": ",".join(["127.0.0.1"] * HOSTS),
        "GLOO_SOCKET_IFNAME": "lo",
        "PORT": str(port),
        "CPU_NUM_DEVICES": str(chips),
    }
    commands = [
        (["speedrun/pod.sh", *words], environment(TPU_WORKER_ID=str(host), **slice_of))
        for host in range(HOSTS)
    ]
    return run_together(commands, folder)


def train_words(made, folder, *more):
    """Return a run in which all kinds of parameters train, clipped."""
    words = ["train", "--checkpoint", made[0], "--cache-dir", made[1], "--output-dir", folder]
    words += ["--max-steps", STEPS, "--batch-size", 8, "--accumulation-steps", 2]
    words += ["--optim.lr", 1e-3, "--optim.clip-grad-norm", 0.5, "--intervals.log-steps", 1]
    words += ["--intervals.eval-steps", 3, "--intervals.save-steps", 2]
    words += ["--device", "xla", "--dtype", "fp32", *more]
    return [*words, "--trainable", "weights", "scales", "codebooks", "norms"]


def curves(folder):
    """Return losses, gradient norms and held-out numbers of a run, by step and name."""
    names = ("train/loss", "train/grad_norm", "eval/kl_nats_lower")
    rows = read_rows(folder)
    return {(row["step"], name): row[name] for row in rows for name in names if name in row}


def test_hosts_train_as_one_chip_does(made, tmp_path):
    """Sequences are shared by hosts and split over their chips; the first host writes."""
    words = [sys.executable, "-m", "qat", *train_words(made, tmp_path / "alone")]
    ((code, _, said),) = run_together(
        [(words, environment(CPU_NUM_DEVICES="1"))], tmp_path / "alone-output"
    )
    assert code == 0, said[-3000:]
    alone = curves(tmp_path / "alone")
    assert len(alone) > 2 * STEPS
    first, second = run_hosts(train_words(made, tmp_path / "run"), tmp_path / "output", chips=2)
    assert (first[0], second[0]) == (0, 0), first[2][-3000:]
    assert json.loads(first[1].splitlines()[-1])["steps"] == STEPS
    assert not [line for line in second[1].splitlines() if line.startswith("{")]
    assert curves(tmp_path / "run") == pytest.approx(alone, abs=CLOSE, rel=0)


def test_rows_are_not_split_over_hosts(made, tmp_path):
    """One line from one of them."""
    words = train_words(made, tmp_path / "run", "--shard")
    ended = run_hosts(words, tmp_path / "output", chips=2)
    assert all(code for code, _, _ in ended)
    errors = "".join(said for _, _, said in ended)
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, errors[-3000:]
    assert "--shard with --device xla: the chips of a host hold rows" in said[0]
