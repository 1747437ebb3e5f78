import json
import re
from pathlib import Path

import pytest

from qat.cli.commands import main
from qat.pipelines.fetch import FetchConfig, fetch
from qat.pipelines.push import PushConfig, push
from qat.storage import stores
from qat.storage.archive import pack_folder, sidecar
from tests.servers import file_server
from tests.tiny import save_tiny, tiny_cache, tiny_llama

pytestmark = pytest.mark.recipe

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tiny_cache(tmp_path_factory.mktemp("cache"), name="built")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    from qat.pipelines.quantize import quantize
    from qat.pipelines.quantize_config import InitStudentConfig

    folder = tmp_path_factory.mktemp("student")
    model = str(save_tiny(folder / "teacher", tiny_llama()))
    settings = {"plan": "q4a4", "fit": "moments", "eval": False, "device": "cpu"}
    quantize(InitStudentConfig(model=model, output=folder / "q4", **settings))
    return folder / "q4"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty place to work in, with a store and no other."""
    (tmp_path / "store").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for variable in ("GDRIVE_PATH", "GCS_BUCKET"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("QAT_STORE", str(tmp_path / "store"))
    return tmp_path


@pytest.fixture
def stored(here, cache, student):
    """A store with a cache and a 4-bit student under the seeds' names."""
    push(PushConfig(folder=cache, name="L64"))
    push(PushConfig(folder=student, name="q4_fp32", suffix="tgz"))
    return here


def run(capsys, *argv):
    """Return exit code, closing values and what was said."""
    code = main("fetch", list(argv))
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def test_short_names_give_a_cache_and_a_checkpoint(stored, capsys):
    """Under the paths that the seeds' commands name; the second time nothing is done."""
    code, values, _ = run(capsys, "L64", "q4_fp32")
    assert code == 0
    assert values["cache"] == "caches/alpaca_chat_think_both_L64_K64_R128"
    assert values["checkpoint"] == "runs/speedrun/anemll_v2_q4_a4_from_v1_finetuned.pt"
    assert [item["skipped"] for item in values["fetched"]] == [False, False]
    code, values, said = run(capsys, "q4_fp32", "L64")
    assert [item["skipped"] for item in values["fetched"]] == [True, True]
    assert said.count("nothing to do") == 2
    _, values, _ = run(capsys, "L64", "--force")
    assert not values["fetched"][0]["skipped"]


def test_what_was_changed_is_fetched_again(stored, capsys):
    """Present means whole: one byte off, or a shard away, and it is not."""
    fetch(FetchConfig(source=("L64", "q4_fp32")))
    shard = next((stored / "work" / "caches").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    header = next((stored / "work" / "runs").rglob("student.safetensors"))
    header.unlink()
    _, values, said = run(capsys, "L64", "q4_fp32")
    assert [item["skipped"] for item in values["fetched"]] == [False, False]
    assert "not taken as it is" in said
    _, values, _ = run(capsys, "L64", "q4_fp32")
    assert [item["skipped"] for item in values["fetched"]] == [True, True]


def test_what_was_made_here_needs_no_store(here, cache, student, capsys, monkeypatch):
    """A whole cache and a whole student without a receipt are opened and taken as they are."""
    import shutil

    shutil.copytree(cache, "caches/mine")
    shutil.copytree(student, "runs/speedrun/own.pt")
    monkeypatch.delenv("QAT_STORE")
    _, values, _ = run(capsys, "mine", "own")
    assert (values["cache"], values["checkpoint"]) == ("caches/mine", "runs/speedrun/own.pt")


def test_names_in_a_store_are_words_too(here, cache, student, capsys):
    """Whatever the store's folder says that it is."""
    push(PushConfig(folder=cache))
    push(PushConfig(folder=student, name="my_run"))
    _, values, _ = run(capsys, "built", "my_run")
    assert (values["cache"], values["checkpoint"]) == ("caches/built", "runs/speedrun/my_run.pt")


@pytest.mark.parametrize("ranges", [True, False])
def test_urls_of_archives(stored, capsys, ranges):
    """https:// with and without parts, file://, and plain paths."""
    store = stored / "store"
    with file_server(store, ranges=ranges) as server:
        name = "qwen3_caches/alpaca_chat_think_both_L64_K64_R128.tar.lz4"
        _, values, _ = run(capsys, server.url(name), "--output-dir", "web")
        assert values["cache"] == "web/alpaca_chat_think_both_L64_K64_R128"
    run_file = store / "qwen3_runs" / "anemll_v2_q4_a4_from_v1_finetuned.tgz"
    for word in (run_file.as_uri(), str(run_file)):
        _, values, _ = run(capsys, word, "--force")
        assert values["checkpoint"] == "runs/speedrun/anemll_v2_q4_a4_from_v1_finetuned.pt"
        assert not values["fetched"][0]["skipped"]


def test_unknown_words_are_told_before_anything_is_fetched(stored, capsys):
    """The names that there are, and the stores that were asked; nothing is written."""
    code, _, said = run(capsys, "L64", "q4_typo")
    assert code == 2
    assert "q4_typo" in said
    assert "q4_fp32" in said
    assert str(stored / "store") in said
    assert list((stored / "work").iterdir()) == []


def test_no_store_is_told_with_what_to_set(here, capsys, monkeypatch):
    """Also where the store that is named is not there, or lacks the thing."""
    code, _, said = run(capsys, "q2_init")
    assert code == 2
    assert "q2_init_from_q4.tar.lz4" in said
    assert "qat push" in said
    monkeypatch.setenv("QAT_STORE", str(here / "unmounted"))
    code, _, said = run(capsys, "L64")
    assert code == 2
    assert "QAT_STORE" in said
    assert "mount it" in said
    monkeypatch.delenv("QAT_STORE")
    code, _, said = run(capsys, "L64")
    assert code == 2
    assert "there is no store; set QAT_STORE" in said


def test_a_wrong_checksum_is_told_and_leaves_nothing(stored, capsys):
    """One line, exit code 2, and the next call works once the store is mended."""
    packed = stored / "store" / "qwen3_caches" / "alpaca_chat_think_both_L64_K64_R128.tar.lz4"
    right = sidecar(packed).read_text()
    sidecar(packed).write_text("0" * 64 + "\n")
    code, _, said = run(capsys, "L64")
    assert code == 2
    assert "sha256" in said
    assert "Traceback" not in said
    assert [path.suffix for path in (stored / "work" / "caches").iterdir()] == [".lock"]
    sidecar(packed).write_text(right)
    assert run(capsys, "L64")[0] == 0


def test_the_registry_decides_over_the_store(stored, capsys, cache):
    """Its sha256 and its fingerprint, where it has them, must be those of what is taken."""
    name = "alpaca_chat_think_both_L64_K64_R128"
    registry = stored / "registry.toml"
    text = f'[L64]\nkind = "cache"\nname = "{name}"\nstored_as = "{name}.tar.lz4"\n'
    registry.write_text(text + f'sha256 = "{"0" * 64}"\n')
    code, _, said = run(capsys, "L64", "--registry", str(registry))
    assert code == 2
    assert "the registry says" in said
    registry.write_text(text + 'fingerprint = "0123456789abcdef"\n')
    code, _, said = run(capsys, "L64", "--registry", str(registry))
    assert code == 2
    assert "fingerprint" in said
    assert [path.suffix for path in (stored / "work" / "caches").iterdir()] == [".lock"]
    fingerprint = json.loads((cache / "manifest.json").read_text())["fingerprint"]
    digest = sidecar(stored / "store" / "qwen3_caches" / f"{name}.tar.lz4").read_text().split()[0]
    registry.write_text(text + f'fingerprint = "{fingerprint}"\nsha256 = "{digest}"\n')
    assert run(capsys, "L64", "--registry", str(registry))[0] == 0


def test_a_checkpoint_under_a_caches_name_is_refused(here, student, capsys):
    """What comes out must be what the name says."""
    name = "alpaca_chat_think_both_L64_K64_R128"
    pack_folder(student, here / "store" / "qwen3_caches" / f"{name}.tgz")
    code, _, said = run(capsys, "L64")
    assert code == 2
    assert "no cache" in said
    assert [path.suffix for path in (here / "work" / "caches").iterdir()] == [".lock"]


def test_a_dry_run_writes_nothing(stored, capsys):
    """It tells what would be taken from where."""
    code, values, said = run(capsys, "L64", "q4_fp32", "smollm2", "--dry-run")
    assert code == 0
    assert "would take" in said
    assert values["cache"] == "caches/alpaca_chat_think_both_L64_K64_R128"
    assert list((stored / "work").iterdir()) == []
    assert run(capsys)[0] == 2


def test_the_page_quotes_messages_that_are_said():
    """Each message in the table of speedrun/README.md is one of ours, word for word."""
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "speedrun" / "README.md").read_text(), re.M)
    messages = rows[rows.index("there is no store; set QAT_STORE") :]
    files = [*(ROOT / "qat").rglob("*.py"), *(ROOT / "speedrun").glob("*.py")]
    said = " ".join(file.read_text() for file in [*files, ROOT / "speedrun" / "setup.sh"])
    said = re.sub(r'"\s+f?"', "", said).replace("{stores.HOW_TO_GIVE}", stores.HOW_TO_GIVE)
    assert len(messages) > 10
    for message in messages:
        for part in re.split(r"\.\.\.", message):
            assert part.strip(" ,;") in said, message
