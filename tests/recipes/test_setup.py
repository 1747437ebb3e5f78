"""`source speedrun/setup.sh` in real shells, on real stores, with real failures."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import file_server
from tests.tiny import save_tiny, tiny_llama, tiny_records, write_jsonl

pytestmark = pytest.mark.recipe
ROOT = Path(__file__).parent.parent.parent
SHELLS = {"bash": ["bash", "--norc", "--noprofile"], "zsh": ["zsh", "-f"]}
CACHE = "alpaca_chat_think_both_L64_K64_R128"
Q4 = "anemll_v2_q4_a4_from_v1_finetuned"
LINKED = ("qat", "scripts", "speedrun", "pyproject.toml")


@pytest.fixture(params=SHELLS)
def shell(request):
    """A shell without anybody's settings."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed; apt-get install {request.param}")
    return SHELLS[request.param]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store that `qat push` has filled: a cache as .tar.lz4, a 4-bit student as .tgz."""
    from qat.cache.config import BuildCacheConfig
    from qat.pipelines.build_cache import build_cache
    from qat.pipelines.push import PushConfig, push
    from qat.pipelines.quantize import quantize
    from qat.pipelines.quantize_config import InitStudentConfig

    folder = tmp_path_factory.mktemp("made")
    teacher = str(save_tiny(folder / "teacher", tiny_llama()))
    data = str(write_jsonl(folder / "records.jsonl", tiny_records()))
    flags = {"device": "cpu", "dtype": "fp32"}
    sizes = {"seq_len": 16, "top_k": 8, "batch_size": 4}
    cache = build_cache(
        BuildCacheConfig(
            teacher=teacher, data=data, output_dir=folder, name="small", **sizes, **flags
        )
    ).cache
    quantize(
        InitStudentConfig(
            model=teacher, output=folder / "q4", cache_dir=Path(cache), fit="moments", **flags
        )
    )
    (folder / "store").mkdir()
    base = str(folder / "store")
    push(PushConfig(folder=Path(cache), store=base, name="L64"))
    push(PushConfig(folder=folder / "q4", store=base, name="q4_fp32", suffix="tgz"))
    return folder / "store"


@pytest.fixture
def checkout(tmp_path):
    """A checkout of its own, so that nothing is left in this one."""
    made = tmp_path / "a checkout"
    made.mkdir()
    for name in LINKED:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, made / name)
    return made


@pytest.fixture
def run(checkout, shell, tmp_path):
    """Run lines in a fresh shell in the checkout; return what they print, line by line."""

    def in_shell(script, store=None, **variables):
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "QAT_PYTHON": sys.executable,
            "PYTHONPATH": str(checkout),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",  # a file size limit would leave a half one
            **({"QAT_STORE": str(store)} if store else {}),
            **variables,
        }
        done = subprocess.run(
            [*shell, "-c", script],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        in_shell.said = done.stderr
        return done.stdout.splitlines()

    return in_shell


STATE = 'echo "$?|$PWD|${CACHE_DIR-unset}|${CHECKPOINT-unset}"'
LEFT = "typeset -f | grep -c __qat; set | grep -c '^__qat'; echo $-"


def test_both_variables_are_set(run, store, checkout):
    """Of exactly what was asked for; the shell is as it was, also for one that is strict."""
    before = run("echo $-")[-1]
    lines = run(f"source speedrun/setup.sh L64 q4_fp32; {STATE}; {LEFT}", store)
    assert lines[0] == f"0|{checkout}|caches/{CACHE}|runs/speedrun/{Q4}.pt", run.said
    assert lines[1:] == ["0", "0", before]
    assert (checkout / "caches" / CACHE / "manifest.json").is_file()
    assert (checkout / "runs" / "speedrun" / f"{Q4}.pt" / "checkpoint.json").is_file()
    strict = run(f"set -eu; source speedrun/setup.sh L64; {STATE}; echo $-", store)
    assert strict[0] == f"0|{checkout}|caches/{CACHE}|unset"
    assert {"e", "u"} <= set(strict[1])
    assert "nothing to do" in run.said


def test_from_another_folder_paths_are_whole(run, store, checkout):
    """What was set works from where the person is, spaces in the path or not."""
    line = run(f'cd /; source "{checkout}/speedrun/setup.sh" q4_fp32 --force; {STATE}', store)[0]
    assert line == f"0|/|unset|{checkout}/runs/speedrun/{Q4}.pt", run.said


@pytest.mark.parametrize(
    ("words", "variables", "told"),
    [
        ("L64", {}, "there is no store; set QAT_STORE"),
        ("L64", {"QAT_STORE": "/none/such"}, "mount it"),
        ("L128", {"QAT_STORE": "STORE"}, "qat push"),
        ("L64 q4_typo", {"QAT_STORE": "STORE"}, "is none of L64, L128"),
        ("L64 --fast", {"QAT_STORE": "STORE"}, "unknown flag --fast"),
        ("L64", {"QAT_STORE": "STORE", "QAT_PYTHON": "/bin/false", "NO_PATH": "1"}, "Python 3.11"),
    ],
    ids=["no store", "not mounted", "not there", "unknown word", "unknown flag", "no Python"],
)
def test_a_failure_leaves_the_shell_as_it_was(run, store, checkout, words, variables, told):
    """Variables, folder and functions; the message says what to do."""
    variables = {key: str(store) if v == "STORE" else v for key, v in variables.items()}
    path = "there=$PATH; PATH=/none; " if "NO_PATH" in variables else "there=$PATH; "
    call = f"CACHE_DIR=before; source speedrun/setup.sh {words}; {STATE}"
    lines = run(f"{path}{call}; PATH=$there; {LEFT}", **variables)
    assert lines[0] == f"2|{checkout}|before|unset", run.said
    assert lines[1:3] == ["0", "0"]
    assert told in run.said
    assert "Traceback" not in run.said
    assert not (checkout / "caches").exists()


def test_a_wrong_checksum_then_the_right_one(run, store, checkout, tmp_path):
    """Once the store is right, the same line works."""
    broken = tmp_path / "broken"
    shutil.copytree(store, broken)
    packed = broken / "qwen3_caches" / f"{CACHE}.tar.lz4"
    data = bytearray(packed.read_bytes())
    data[len(data) // 2] ^= 1
    packed.write_bytes(data)
    assert run(f"source speedrun/setup.sh L64; {STATE}", broken)[0].startswith("2|")
    assert "fetch it again" in run.said
    shutil.copy(store / "qwen3_caches" / packed.name, packed)
    assert run(f"source speedrun/setup.sh L64; {STATE}", broken)[0].startswith("0|"), run.said


def test_a_disk_that_takes_no_more(run, store, checkout):
    """A limit of the system stands for it: nothing half stays, and the shell lives."""
    # 8 blocks of 512 or 1024 bytes, below the size of any file with content.
    lines = run(f"(ulimit -f 8; source speedrun/setup.sh L64; {STATE})", store)
    assert lines[0] == f"2|{checkout}|unset|unset", run.said
    assert "Traceback" not in run.said
    assert not (checkout / "caches" / CACHE).exists()
    assert run(f"source speedrun/setup.sh L64; {STATE}", store)[0].startswith("0|"), run.said


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_copy_goes_on(run, store, checkout, ranges):
    """A server that dies in the middle: the shell lives, the next call gets the rest."""
    with file_server(store, ranges=ranges, cut_after=2000, cuts=10**6) as server:
        server.dies = True
        line = run(f"source speedrun/setup.sh L64; {STATE}", server.url())[0]
        assert line == f"2|{checkout}|unset|unset", run.said
        assert "run the same command again" in run.said
        part = checkout / "caches" / f".{CACHE}.tar.lz4.part"
        have = part.stat().st_size
        assert have == 2000
        server.dies, server.cuts, server.status = False, 0, 0
        line = run(f"source speedrun/setup.sh L64; {STATE}", server.url())[0]
        assert line == f"0|{checkout}|caches/{CACHE}|unset", run.said
        assert f"bytes={have}-" in [headers.get("Range") for _, _, headers in server.asked]
    assert [path.name for path in (checkout / "caches").iterdir() if path.suffix == ".part"] == []


def test_a_killed_copy_goes_on(checkout, run, store):
    """A kill in the middle leaves a part, and nothing under the final name."""
    with file_server(store, slow_after=2000) as server:
        process = subprocess.Popen(
            [sys.executable, "-m", "qat", "fetch", "L64"],
            cwd=checkout,
            env={**os.environ, "QAT_STORE": server.url(), "PYTHONPATH": str(checkout)},
            stderr=subprocess.DEVNULL,
        )
        part = checkout / "caches" / f".{CACHE}.tar.lz4.part"
        assert server.reached.wait(60)
        process.kill()
        process.wait()
        assert part.is_file()
        assert not (checkout / "caches" / CACHE).exists()
        server.slow_after = None
        assert run(f"source speedrun/setup.sh L64; {STATE}", server.url())[0].startswith("0|")


def test_a_dry_run_sets_and_writes_nothing(run, store, checkout):
    """It tells what it would do."""
    lines = run(f"source speedrun/setup.sh L64 q4_fp32 --dry-run; {STATE}", store)
    assert lines == [f"0|{checkout}|unset|unset"]
    assert f"would set CACHE_DIR=caches/{CACHE} CHECKPOINT=runs/speedrun/{Q4}.pt" in run.said
    assert not (checkout / "caches").exists()


def test_run_instead_of_sourced_it_says_so(checkout, shell):
    """A child cannot set its parent's variables; sh is told as well."""
    for command in (shell, ["sh"]):
        done = subprocess.run(
            [*command, "speedrun/setup.sh", "L64"], cwd=checkout, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert "source it" in done.stderr


def make_python(folder: Path, versions: dict[str, str]) -> Path:
    """Make a Python that has nothing but the metadata of some packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name, version in versions.items():
        info = packages / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder / "bin" / "python"


def ask_install(python: Path, **variables) -> str:
    """Return what a dry run of the installation says."""
    done = subprocess.run(
        [str(python), str(ROOT / "speedrun" / "install.py"), "--dry-run"],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], **variables},
        check=True,
    )
    assert done.stdout.strip() == str(python)
    return done.stderr


def test_torch_that_is_there_is_never_touched(tmp_path):
    """As on Colab's TPU image: what is missing is added, the package itself without its wishes."""
    image = {"torch": "2.9.0+cpu", "torch_xla": "2.9.0", "numpy": "2.1.3", "transformers": "5.15.0"}
    said = ask_install(make_python(tmp_path / "tpu", image), GCS_BUCKET="bucket")
    lines = [line for line in said.splitlines() if "would run" in line]
    assert len(lines) == 2
    assert "--constraint" in lines[0]
    words = lines[0].split()
    assert {"lz4", "tyro", "wandb", "gcsfs"} <= set(words)
    assert not [word for word in words if word.startswith(("torch", "numpy", "transformers"))]
    assert "--no-deps --editable" in lines[1]
    assert "keep torch==2.9.0+cpu, torch_xla==2.9.0, numpy==2.1.3" in said


def test_a_python_with_nothing_gets_everything(tmp_path):
    """Files with hashes, then torch, all of it in the versions of constraints.txt."""
    said = ask_install(make_python(tmp_path / "bare", {}))
    lines = [line for line in said.splitlines() if "would run" in line]
    assert len(lines) == 2
    assert "--require-hashes --no-deps --requirement" in lines[0]
    assert "--no-deps" not in lines[1]
    assert "--constraint" in lines[1]
    assert "torch is not installed" in said
    assert "versions: as tested" in said


def test_a_tpu_asks_for_an_older_torch_than_was_tested():
    """All other versions are those of constraints.txt; next to a torch only what is there stays."""
    fixed = runpy.run_path(str(ROOT / "speedrun" / "install.py"))["fixed_versions"]
    tested = (ROOT / "constraints.txt").read_text().splitlines()
    assert fixed(lambda _name: None) == tested
    left_out = set(tested) - set(fixed(lambda _name: None, is_tpu=True))
    assert [line.partition("==")[0] for line in left_out] == ["torch"]
    assert fixed({"torch": "2.9.0", "lz4": "4"}.get) == ["torch==2.9.0"]


def test_the_seeds_commands_run_word_for_word(run, store, checkout):
    """Setup, convert, train, on what setup has named; then the log has its entry."""
    # The seeds' base is a hub name; of this one, a path, the store knows the last name alone.
    (checkout / "teacher").symlink_to(store.parent / "teacher")
    script = f"""
source speedrun/setup.sh L64 q4_fp32 || exit 1
python scripts/convert_q4_to_q2.py \\
    --q4-checkpoint runs/speedrun/{Q4}.pt \\
    --output runs/speedrun/q2_init.pt \\
    --eval --cache-dir caches/{CACHE} || exit 2
CHECKPOINT=runs/speedrun/q2_init.pt
python scripts/train_v2_simple.py \\
    --v2-checkpoint $CHECKPOINT \\
    --cache-dir $CACHE_DIR \\
    --output-dir runs/sr-002 \\
    --mlp-only --max-steps 4 \\
    --batch-size 4 --lr 5e-5 \\
    --wandb --wandb-run "SR-002" \\
    --gdrive-dir drive/qwen3_runs/sr-002 || exit 3
python -m qat log-run runs/sr-002 --name SR-002 --goal "Train Q2 MLP layers" || exit 4
python -m qat push runs/sr-002 --store drive || exit 5
"""
    run(script, store, WANDB_MODE="offline")
    assert not [line for line in run.said.splitlines() if line.startswith("error")], run.said
    assert (checkout / "drive" / "qwen3_runs" / "sr-002" / "best" / "checkpoint.json").is_file()
    assert (checkout / "drive" / "qwen3_runs" / "sr-002.tar.lz4").is_file()
    log = (checkout / "speedrun" / "log.md").read_text()
    assert "SR-002" in log
    assert "Train Q2 MLP layers" in log
    assert (checkout / "runs" / "sr-002" / "summary.json").is_file(), run.said


def test_the_benchmark_runs_on_what_setup_names(run, store, checkout):
    """The seeds' third command, with sizes that end soon on a CPU."""
    script = """
source speedrun/setup.sh L64 q4_fp32 || exit 1
python speedrun/benchmark.py --cache-dir $CACHE_DIR --dtype bf16 --batch-sizes 2 --steps 2 \\
    --load-model $CHECKPOINT && echo "done"
"""
    assert run(script, store)[-1] == "done", run.said
