"""The reference path and the notebook, whole, on a tiny model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import save_tiny, tiny_llama, tiny_records, write_jsonl

pytestmark = pytest.mark.recipe
ROOT = Path(__file__).parent.parent.parent
COPIED = ("qat", "scripts", "speedrun", "pyproject.toml")


@pytest.fixture
def checkout(tmp_path):
    """A checkout of its own, so that nothing is left in this one."""
    made = tmp_path / "checkout"
    made.mkdir()
    for name in COPIED:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, made / name)
    return made


@pytest.fixture
def environment(checkout, tmp_path):
    """What makes every size tiny."""
    save_tiny(tmp_path / "teacher", tiny_llama())
    write_jsonl(tmp_path / "records.jsonl", tiny_records())
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "QAT_PYTHON": sys.executable,
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "TEACHER": str(tmp_path / "teacher"),
        "DATA": str(tmp_path / "records.jsonl"),
        "STEPS": "2",
        "BATCH": "2",
        "SEQ_LEN": "16",
        "TOP_K": "8",
        "DEVICE": "cpu",
        "FIT": "moments",
    }


def call(checkout, environment, *words):
    """Run a command in the checkout; return it ended."""
    return subprocess.run(
        words, cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )


def test_the_path_from_teacher_to_log(checkout, environment):
    """Each stage with its closing JSON; the second call finds every stage made."""
    environment |= {"WANDB": "1", "DRIVE": str(checkout / "drive")}
    done = call(checkout, environment, "speedrun/run.sh", "colab")
    assert done.returncode == 0, done.stderr
    closings = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(closings) == 9  # the teacher is a folder already
    runs = checkout / "runs" / "colab"
    assert (runs / "q2_mlp_2" / "best" / "checkpoint.json").is_file()
    assert (runs / "compare" / "compare.html").is_file()
    log = (runs / "log.md").read_text()
    assert ": colab-2 - v2_q2a4" in log
    assert "**Instance**: device cpu" in log
    assert (runs / "plots" / "colab-2.png").is_file()
    assert (checkout / "drive" / "qwen3_runs" / "colab" / "best").is_dir()
    config = json.loads((runs / "q2_mlp_2" / "config.json").read_text())
    assert config["config"]["tracking"]["group"] == "speedrun-colab"
    again = call(checkout, environment, "speedrun/run.sh", "colab")
    assert again.returncode == 0, again.stderr
    assert "q2_mlp_2 is already complete" in again.stderr


def test_a_recipe_is_a_row(checkout, environment, tmp_path):
    """Given again it is found; another one is another row, which names what it changes."""
    flags = {"model": environment["TEACHER"], "data": environment["DATA"], "name": "tried"}
    flags |= {"sequences": 64, "seq-len": 16, "work": tmp_path / "work", "eval-sequences": 8}
    flags |= {"table": tmp_path / "a.csv", "fit.sequences": 16, "device": "cpu"}
    words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    words = [sys.executable, "speedrun/recipe.py", *words]
    trained = [
        "--minutes",
        "0.2",
        "--optim.lr",
        "0.02",
        "--heldout",
        str(checkout / "pyproject.toml"),
    ]
    rows = []
    for more in (["--minutes", "0"], ["--minutes", "0"], trained):
        done = call(checkout, environment, *words, *more)
        assert done.returncode == 0, done.stderr
        rows.append(json.loads(done.stdout))
    assert rows[0]["kl"] == rows[0]["kl_fit"] == rows[2]["kl_fit"]
    assert {name: str(value) for name, value in rows[0].items()} == rows[1]
    assert rows[2]["changes"] == '{"fit.sequences": 16, "optim.lr": 0.02}'
    assert rows[2]["steps"] > 0
    assert rows[2]["kl"] < rows[2]["kl_fit"]
    assert rows[2]["kl_heldout"] > 0
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("size", "teacher", "words"),
    [
        ("demo", "models/smollm2-135m", ["--device cpu", "--fit moments", "--max-steps 64"]),
        ("colab", "Qwen/Qwen3-0.6B", ["--device auto", "--thinking both", "--max-steps 4000"]),
        ("tpu", "Qwen/Qwen3-0.6B", ["--device xla", "--batch-size 24", "--fit moments"]),
    ],
)
def test_every_size_has_its_own_values(checkout, tmp_path, size, teacher, words):
    """A stand-in for `qat` writes down what it is asked for: every stage, in order."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "qat"
    fake.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/asked"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = call(checkout, environment, "speedrun/run.sh", size)
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text()
    stages = [line.split()[0] for line in asked.splitlines() if not line.startswith("fetch")]
    assert stages == ["doctor", "build-cache", "init-student", "convert-q4-to-q2", "train"] + [
        "evaluate",
        "generate",
        "compare",
        "log-run",
    ]
    assert f"--teacher {teacher} " in asked
    for word in words:
        assert word in asked
    assert ("fetch smollm2" in asked) == (size == "demo")


def test_a_new_model_from_text_to_files_in_two_processes(checkout, environment, tmp_path):
    """Each stage, trained by torchrun; the second call finds all of them made."""
    (tmp_path / "records.jsonl").unlink()
    paragraphs = (ROOT / "speedrun" / "log.md").read_text().split("\n\n")
    write_jsonl(tmp_path / "records.jsonl", [{"text": text} for text in paragraphs])
    save_tiny(tmp_path / "shape", tiny_llama(vocab_size=500))
    (tmp_path / "shape" / "model.safetensors").unlink()
    environment |= {"ARCH": str(tmp_path / "shape"), "VOCABULARY": "500", "PROCESSES": "2"}
    environment |= {"ACCUMULATION": "1", "STEPS": "4", "BATCH": "4", "STUDENT_STEPS": "2"}
    environment |= {"STUDENT_BATCH": "4", "CACHE_SEQUENCES": "32", "CACHE_SEQ_LEN": "16"}
    environment |= {"HELDOUT_RATIO": "0.2", "FORMATS": "q4_0", "RUNS": str(tmp_path / "runs")}
    for count in (9, 7):  # exports that are there print nothing
        done = call(checkout, environment, "speedrun/new_model.sh", "medium")
        assert done.returncode == 0, done.stderr
        closing = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(closing) == count
        assert closing[2]["steps"] == 4
    files = sorted(path.name for path in (tmp_path / "runs").glob("*.gguf"))
    assert files == ["f16.gguf", "q4_0.gguf"]


def test_an_unknown_size_is_told(checkout, environment):
    """With those that there are."""
    done = call(checkout, environment, "speedrun/run.sh", "huge")
    assert done.returncode == 2
    assert "none of demo, colab, tpu" in done.stderr
    done = call(checkout, environment, "speedrun/new_model.sh", "huge")
    assert done.returncode == 2
    assert "none of medium, full" in done.stderr


def test_a_job_that_is_none_is_told(checkout, environment):
    """With the line that submits one."""
    done = call(checkout, environment, "speedrun/slurm.sh", "train")
    assert done.returncode == 2
    assert "no SLURM job; use: sbatch --nodes 4" in done.stderr


def test_hosts_without_chips_are_told(checkout, environment):
    """This Python has no torch_xla, which asks the slice; with what installs it."""
    done = call(checkout, environment, "speedrun/pod.sh", "train")
    assert done.returncode == 2
    assert "which host of a TPU slice this is" in done.stderr
    assert "pip install -e '.[tpu-xla]'" in done.stderr


def test_the_notebook_runs_from_top_to_bottom(checkout, environment, monkeypatch):
    """On the demo size; its cells call the same commands."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    for name, value in {**environment, "QAT_SIZE": "demo"}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(checkout / "speedrun" / "colab.ipynb", as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(checkout / "speedrun")}},
    )
    client.execute()
    shown = notebook.cells[-2]["outputs"][-1]["data"]["text/markdown"]
    assert ": demo-2 - v2_q2a4" in shown


def test_q2_init_is_made_and_put_into_the_store(checkout, environment, tmp_path):
    """From q4_fp32 and L64 in a store; another machine then gets q2_init by its word."""
    from qat.cache.config import BuildCacheConfig
    from qat.pipelines.build_cache import build_cache
    from qat.pipelines.push import PushConfig, push
    from qat.pipelines.quantize import quantize
    from qat.pipelines.quantize_config import InitStudentConfig

    flags = {"device": "cpu", "dtype": "fp32"}
    cache = build_cache(
        BuildCacheConfig(
            teacher=environment["TEACHER"],
            data=environment["DATA"],
            output_dir=tmp_path,
            name="small",
            seq_len=16,
            top_k=8,
            **flags,
        )
    ).cache
    quantize(
        InitStudentConfig(
            model=environment["TEACHER"],
            output=tmp_path / "q4",
            cache_dir=Path(cache),
            fit="moments",
            **flags,
        )
    )
    (tmp_path / "store").mkdir()
    base = str(tmp_path / "store")
    push(PushConfig(folder=Path(cache), store=base, name="L64"))
    push(PushConfig(folder=tmp_path / "q4", store=base, name="q4_fp32"))
    environment["QAT_STORE"] = base
    done = call(checkout, environment, "speedrun/create_q2_init.sh")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "store" / "qwen3_runs" / "q2_init_from_q4.tar.lz4").is_file()
    word = 'cd "$0" && source speedrun/setup.sh q2_init && test -d "$CHECKPOINT"'
    done = call(checkout, environment, "bash", "-c", word, str(checkout))
    assert done.returncode == 0, done.stderr
