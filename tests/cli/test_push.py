import json
import shutil

import pytest

from qat.cli.commands import main
from qat.storage.archive import extract_archive, sidecar
from tests.tiny import save_tiny, tiny_cache, tiny_llama

pytestmark = pytest.mark.recipe


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tiny_cache(tmp_path_factory.mktemp("cache"), name="built")


@pytest.fixture
def student(tmp_path):
    from qat.pipelines.quantize import quantize
    from qat.pipelines.quantize_config import InitStudentConfig

    model = str(save_tiny(tmp_path / "teacher", tiny_llama()))
    settings = {"plan": "q4a4", "fit": "moments", "eval": False, "device": "cpu"}
    quantize(InitStudentConfig(model=model, output=tmp_path / "run" / "best", **settings))
    return tmp_path / "run"


@pytest.fixture
def store(tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("QAT_STORE", "GDRIVE_PATH", "GCS_BUCKET"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "store"


def run(capsys, *argv):
    code = main("push", [str(word) for word in argv])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def test_a_cache_lands_in_its_folder(cache, store, capsys):
    """With its checksum; nothing is left next to what was pushed."""
    before = sorted(cache.parent.iterdir())
    code, values, _ = run(capsys, cache, "--store", store)
    assert code == 0
    packed = store / "qwen3_caches" / "built.tar.lz4"
    assert values["archive"] == str(packed)
    assert sidecar(packed).read_text().split() == [values["sha256"], "built.tar.lz4"]
    assert values["bytes"] == packed.stat().st_size
    assert sorted(cache.parent.iterdir()) == before


def test_a_run_goes_without_what_only_goes_on_with_it(student, store, capsys):
    """State and wandb's files stay here, also with links in them."""
    (student / "state").mkdir()
    (student / "state" / "state.pt").write_bytes(b"large")
    (student / "wandb").mkdir()
    (student / "wandb" / "latest-run").symlink_to("/etc")
    (student / "metrics.jsonl").write_text("")
    code, values, _ = run(capsys, student, "--store", store, "--name", "SR-010", "--suffix", "tgz")
    assert code == 0
    out = extract_archive(store / "qwen3_runs" / "SR-010.tgz", store / "out")
    assert {path.name for path in out.iterdir()} == {"best", "metrics.jsonl"}


def test_paths_of_this_machine_stay_here(student, store, capsys):
    """The student is found again where `--model-id` says; its own files are as they were."""
    code, values, err = run(capsys, student / "best", "--store", store)
    assert code == 0, err
    out = extract_archive(store / "qwen3_runs" / "best.tar.lz4", store / "out")
    assert str(student.parent) in (student / "best" / "checkpoint.json").read_text()
    assert not [path for path in out.iterdir() if str(student.parent).encode() in path.read_bytes()]
    header = json.loads((out / "checkpoint.json").read_text())
    assert header["base_model"]["path"] == "teacher"
    flags = ["--checkpoint", out, "--plan", "q2a4", "--output", store / "s", "--device", "cpu"]
    flags += ["--model-id", student.parent / "teacher"]
    assert main("convert", [str(flag) for flag in flags]) == 0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/anna/models/qwen", "qwen"),
        ("--output-dir=/home/anna/runs/one/", "--output-dir=one"),
        ("~/models/qwen", "qwen"),
        ("math=/data/anna/math.parquet", "math=math.parquet"),
        ("file:///home/anna/text.txt", "text.txt"),
        (r"C:\Users\anna\qwen", "qwen"),
        ("gs://bucket/anna/run", "gs://bucket/anna/run"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("</s>", "</s>"),
        ("/", "/"),
    ],
)
def test_of_a_path_its_last_name_goes(value, expected):
    """Addresses, hub names and plain words stay."""
    from qat.pipelines.push import shortened

    assert shortened({"a": [value]}) == {"a": [expected]}


def test_a_file_of_the_seeds_goes_with_its_config(store, tmp_path, capsys, fixtures_folder):
    """`qat fetch` then has both in one folder."""
    run_folder = fixtures_folder / "v2_q4a4_qwen3" / "run"
    shutil.copytree(run_folder, tmp_path / "speedrun")
    (tmp_path / "speedrun" / "other").mkdir()
    file = tmp_path / "speedrun" / "best_state_dict.pt"
    code, _, _ = run(capsys, file, "--store", store, "--name", "q4_fp32")
    assert code == 0
    name = "anemll_v2_q4_a4_from_v1_finetuned"
    out = extract_archive(store / "qwen3_runs" / f"{name}.tar.lz4", store / "out")
    assert {path.name for path in out.iterdir()} == {"best_state_dict.pt", "config.json"}


@pytest.fixture
def fixtures_folder():
    """The seeds' own files, where this checkout has them."""
    from pathlib import Path

    root = Path(__file__).parent.parent.parent
    for folder in (root / "shared" / "fixtures", root.parent / "shared" / "fixtures"):
        if folder.is_dir():
            return folder
    pytest.skip("the fixtures of the seeds are not next to this checkout")


def test_what_is_not_whole_is_not_pushed(cache, student, store, tmp_path, capsys):
    """A cache without a shard, a student with a bit off, a folder of something, nothing."""
    broken = tmp_path / "broken"
    shutil.copytree(cache, broken)
    next(broken.glob("*.safetensors")).unlink()
    assert run(capsys, broken, "--store", store)[0] == 2
    tensors = student / "best" / "student.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    code, _, said = run(capsys, student, "--store", store)
    assert code == 2
    assert "sha256" in said
    assert run(capsys, tmp_path / "none", "--store", store)[0] == 2
    assert list(store.iterdir()) == []


def test_where_to_is_told(cache, store, capsys):
    """No store, one that is not there, one that takes nothing, a name of the other kind."""
    code, _, said = run(capsys, cache)
    assert code == 2
    assert "give --store" in said
    code, _, said = run(capsys, cache, "--store", store / "none")
    assert code == 2
    assert "--store" in said
    code, _, said = run(capsys, cache, "--store", "https://127.0.0.1:9/x")
    assert code == 2
    assert "only be read" in said
    code, _, said = run(capsys, cache, "--store", store, "--name", "q2_init")
    assert code == 2
    assert "stands for a checkpoint" in said
