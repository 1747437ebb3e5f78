"""The Python API: what `import qat` costs, what its functions take and refuse."""

import inspect
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from statistics import median
from types import ModuleType

import pytest

import qat
from qat.pipelines.api import make_config
from tests.tiny import (
    save_student,
    save_tiny,
    tiny_llama,
    tiny_records,
    tiny_student,
    write_jsonl,
)

ROOT = Path(__file__).parent.parent.parent
FUNCTIONS = ("build_cache", "compress", "quantize", "train", "evaluate", "export")
MOST_MILLISECONDS = 100  # 50 are aimed at; a busy machine takes longer


def run_python(code):
    """Run a program in a fresh process; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_importing_the_package_is_quick_and_loads_no_torch():
    """The median of three processes; what is heavy is imported when it is used."""
    code = (
        "import sys, time; start = time.perf_counter(); import qat; "
        "print(time.perf_counter() - start, 'torch' in sys.modules)"
    )
    answers = [run_python(code).split() for _ in range(3)]
    assert {answer[1] for answer in answers} == {"False"}
    assert median(float(answer[0]) for answer in answers) < MOST_MILLISECONDS / 1000


@pytest.mark.recipe
def test_a_config_loads_no_torch():
    """Settings can be checked on any machine."""
    code = "import sys, qat; qat.TrainConfig, qat.BuildCacheConfig; print('torch' in sys.modules)"
    assert run_python(code).strip() == "False"


@pytest.mark.recipe
def test_a_function_stays_one_where_a_folder_has_its_name():
    """Importing `qat.train.config` set `qat.train` to the folder, which cannot be called."""
    folders = [name for name in FUNCTIONS if (ROOT / "qat" / name).is_dir()]
    assert "train" in folders
    assert all(isinstance(import_module(f"qat.{name}"), ModuleType) for name in folders)
    for name in FUNCTIONS:
        assert inspect.isfunction(getattr(qat, name))
        assert name in dir(qat)
    imports = "; ".join(f"import qat.{name}" for name in [*folders, "train.config"])
    names = ", ".join(f"qat.{name}" for name in FUNCTIONS)
    assert run_python(f"{imports}; print(all(map(callable, ({names}))))").strip() == "True"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_documented(name):
    """Arguments, result, errors and an example."""
    text = inspect.getdoc(getattr(qat, name))
    for section in ("Args:", "Returns:", "Raises:", "Example:"):
        assert section in text
    for parameter in inspect.signature(getattr(qat, name)).parameters:
        assert re.search(rf"^\s+{parameter}: ", text, re.MULTILINE), parameter


def test_an_unknown_name_is_an_attribute_error():
    """As of any module."""
    with pytest.raises(AttributeError, match="'qat' has no attribute 'trian'"):
        _ = qat.trian


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: qat.export("a", "hf", "b", hed="f16"), "hed: no setting of ExportConfig"),
        (lambda: qat.quantize("a", "q4a4", output="b", cache_dir="c"), "cache_dir"),
        (lambda: qat.quantize("a", "q4a4", output="b", bits=4), "bits: no setting of InitStudent"),
    ],
)
def test_a_wrong_setting_is_a_type_error_that_names_it(call, named):
    """Before anything is read."""
    with pytest.raises(TypeError, match=named):
        call()


def test_strings_become_paths():
    """Both are taken where a config has a path."""
    config = make_config(qat.ExportConfig, checkpoint="a", to="hf", output="b/c")
    assert config.output == Path("b/c")
    assert make_config(qat.EvaluateConfig, checkpoint="a", text="t").text == Path("t")


def test_an_export_from_python(tmp_path):
    """The result has the closing line's keys as fields."""
    student = tiny_student("llama", "deploy")
    text_source = save_tiny(tmp_path / "base", tiny_llama())
    folder = save_student(tmp_path / "student", student, text_source, plan="deploy")
    result = qat.export(folder, "gguf", tmp_path / "out.gguf", head="q8_0")
    assert isinstance(result, qat.ExportResult)
    assert result.exact
    assert result.head["type"] == "q8_0"
    assert qat.export(folder, "gguf", tmp_path / "out.gguf", head="q8_0") == result
    with pytest.raises(ValueError, match="exists; remove it or name another"):
        qat.export(folder, "gguf", tmp_path / "out.gguf")


@pytest.mark.recipe
def test_the_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """On a tiny teacher in the place of its own, with two steps."""
    example = re.search(r"```python\n(import qat\n.*?)```", (ROOT / "README.md").read_text(), re.S)
    save_tiny(tmp_path / "models" / "smollm2-135m", tiny_llama())
    (tmp_path / "speedrun" / "data").mkdir(parents=True)
    write_jsonl(tmp_path / "speedrun" / "data" / "instructions.jsonl", tiny_records())
    monkeypatch.chdir(tmp_path)
    exec(example[1].replace("max_steps=400", "max_steps=2"), {})
    kl_nats, exact = capsys.readouterr().out.split()
    assert float(kl_nats) > 0
    assert exact == "True"
    assert (tmp_path / "exports" / "q2.gguf").is_file()
