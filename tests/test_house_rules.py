"""The rules of the package, checked on its source. Each failure says what to do instead.

The layers are read from the map in README.md, so a folder is declared in one place.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from qat.cli.commands import PIPELINES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qat"
CATCH_ALLS = {"utils", "common", "helpers", "misc", "core", "base"}
HEAVY = ["torch", "torch_xla", "torch_tpu", "wandb", "transformers", "matplotlib", "sklearn"]
# Library to the only places that may import it (a file, or a folder by its prefix).
OWNERS = {
    "torch_xla": ("runtime/device.py",),
    "torch_tpu": ("runtime/device.py",),
    "wandb": ("tracking/sinks.py",),
    "tensorboard": ("tracking/sinks.py",),
    "sklearn": ("grids/codebook.py", "calibrate/token_groups.py"),
    "mlx": ("export/to_mlx.py",),
    "coremltools": ("export/to_coreml",),
    "compressed_tensors": ("export/to_compressed_tensors.py",),
    "lm_eval": ("evaluate/tasks.py",),
}
DEVICE_NAMES = re.compile(r"torch\.(cuda|mps|tpu|xpu|accelerator|backends\.(cuda|mps))\b")
DEVICE_WORDS = {"cuda", "mps", "xla", "tpu"}
MOST_LINES = 60  # of a function
# Functions that are longer, until they are split: no new entries.
LONG_FUNCTIONS: set[str] = set()
MOST_ANY = 1  # parameters typed Any: plain JSON that is checked where it is read
# Help of every command and script from one process, with the heavy modules each one loaded.
ASK_HELP = """
import contextlib, io, json, runpy, sys
from qat.cli.commands import main
heavy, commands, scripts = json.loads(sys.argv[1])
answers = {}
def ask(name, call):
    text = io.StringIO()
    code = None
    with contextlib.redirect_stdout(text):
        try:
            code = call()
        except SystemExit as stop:
            code = stop.code
    answers[name] = [code, text.getvalue(), [module for module in heavy if module in sys.modules]]
for command in commands:
    ask("qat " + command, lambda: main(command, ["--help"]))
for script in scripts:
    sys.argv = [script, "--help"]
    ask("python " + script, lambda: runpy.run_path(script, run_name="__main__"))
print(json.dumps(answers))
"""


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def inside(path: Path) -> str:
    """Return a file's path inside the package, as messages name it."""
    return path.relative_to(PACKAGE).as_posix()


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def read_map() -> dict[str, tuple[int, int]]:
    """Return each folder of README's map with its layer and its place in it."""
    folders = {}
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"(\d) \w+ +((?:[\w]+(?:/|\.py) *)+)", line):
            for place, folder in enumerate(found[2].split()):
                folders[folder.removesuffix("/").removesuffix(".py")] = (int(found[1]), place)
    return folders


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports_of(path: Path) -> set[str]:
    """Return all modules that a file imports, wherever in it; `from a import b` gives `a.b`."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def import_graph() -> dict[str, set[str]]:
    """Return each module of the package with the modules of the package that it imports."""
    modules = {module_name(path): path for path in python_files()}
    graph = {}
    for name, path in modules.items():
        imported = imports_of(path)
        exact = {other for other in imported if other in modules}
        parents = {other.rpartition(".")[0] for other in imported - exact}
        graph[name] = (exact | (parents & modules.keys())) - {name, "qat"}
    return graph


def folder_of(module: str) -> str:
    return module.split(".")[1]


def test_the_map_in_the_readme_equals_the_tree():
    """Every folder is in one layer of the map, and the map names nothing else."""
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert set(read_map()) == files | folders, "fix the map in README.md (or the tree)"


def test_a_module_imports_only_lower_layers_or_its_own_folder():
    """In layers 0 to 2 also folders left of its own on the map; pipelines connect the rest."""
    folders, wrong = read_map(), []
    for module, imported in import_graph().items():
        if module in ("qat", "qat.__main__"):
            continue
        here = folder_of(module)
        for other in imported:
            there = folder_of(other)
            (layer, place), (low, low_place) = folders[here], folders[there]
            in_order = layer == low <= 2 and low_place < place
            if here != there and low >= layer and not in_order:
                wrong.append(f"{module} (layer {layer}) imports {other} (layer {low})")
    assert not wrong, f"pass it as an argument from the pipeline instead: {wrong}"


def test_no_import_is_circular():
    """Imports inside functions count as well."""
    try:
        TopologicalSorter(import_graph()).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other, move what they share down: {error.args[1]}")


def test_the_docstring_of_the_package_agrees_with_the_map():
    """It may name fewer folders than the map, never in another layer."""
    folders = read_map()
    docstring = ast.get_docstring(parse(PACKAGE / "__init__.py"))
    for layer, line in re.findall(r"^(\d)\. (.*)$", docstring, re.MULTILINE):
        for folder in re.findall(r"`(\w+)`", line):
            found = folders.get(folder, (int(layer),))[0]
            assert found == int(layer), f"{folder} in qat/__init__.py"


def test_one_level_of_folders_and_no_catch_all():
    """Names say what is inside; folders hold files, not folders."""
    for path in python_files():
        assert len(path.relative_to(PACKAGE).parts) <= 2, f"{inside(path)} lies too deep"
        assert not CATCH_ALLS & {path.stem, path.parent.name}, f"{inside(path)}: name what it holds"


def test_init_files_hold_a_docstring_only():
    """What is here and in what order to read it; the package's own holds the Python API too."""
    for path in PACKAGE.glob("*/__init__.py"):
        body = parse(path).body
        assert ast.get_docstring(parse(path)), f"{inside(path)} needs a docstring"
        assert not body[1:], f"{inside(path)}: import from the module itself instead"


def test_only_the_owner_imports_a_foreign_library():
    """wandb, the accelerators and each export's library are named in one place each."""
    for path in python_files():
        for name in imports_of(path):
            owners = OWNERS.get(name.split(".")[0])
            allowed = owners is None or inside(path).startswith(owners)
            assert allowed, f"{inside(path)} imports {name}: that belongs in {owners}"


def test_only_device_names_an_accelerator():
    """Loops ask the Device object; they never ask which device it is."""
    for path in python_files():
        if inside(path) == "runtime/device.py":
            continue
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Attribute):
                text = ast.unparse(node)
                assert not DEVICE_NAMES.match(text), (
                    f"{inside(path)}: {text}; ask qat.runtime.device"
                )
            if isinstance(node, ast.Compare):
                words = {getattr(part, "value", None) for part in (node.left, *node.comparators)}
                line = f"{inside(path)}:{node.lineno}"
                assert not words & DEVICE_WORDS, f"{line} asks which device; give Device a method"


def functions_of(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef)]


def test_functions_are_short():
    """A function fits on a screen; the longer ones are listed until they are split."""
    for path in python_files():
        for function in functions_of(path):
            num_lines = function.end_lineno - function.lineno + 1
            name = f"{inside(path)}:{function.name}"
            assert num_lines <= MOST_LINES or name in LONG_FUNCTIONS, (
                f"{name} has {num_lines} lines, above {MOST_LINES}; split it"
            )


def test_every_module_has_its_test():
    """tests/ mirrors the package; a command and its pipeline may share one test file."""
    for path in python_files():
        folder, _, file = inside(path).rpartition("/")
        if path.stem in ("__init__", "__main__") or path.stem.endswith("config"):
            continue  # configs are tested with the flags of their commands
        folders = {"pipelines", "cli"} if folder in ("pipelines", "cli") else {folder}
        exists = any((ROOT / "tests" / one / f"test_{file}").is_file() for one in folders)
        assert exists, f"write tests/{folder}/test_{file}"


def test_every_entry_of_the_list_exists():
    """An entry of a module that is gone would hide a new one of its name."""
    listed = {name.split(":")[0] for name in LONG_FUNCTIONS}
    absent = sorted(name for name in listed if not (PACKAGE / name).is_file())
    assert not absent, f"remove from the list on top of this file: {absent}"


def test_parameters_have_types():
    """`Any` is for third-party objects without a type."""
    found = []
    for path in python_files():
        for function in functions_of(path):
            one = function.args
            arguments = [*one.posonlyargs, *one.args, *one.kwonlyargs, one.vararg, one.kwarg]
            annotations = [argument.annotation for argument in arguments if argument]
            found += [inside(path) for note in annotations if note and ast.unparse(note) == "Any"]
    assert len(found) <= MOST_ANY, (
        f"{len(found)} parameters are typed Any, above {MOST_ANY}: {Counter(found)}"
    )


def script_names() -> list[str]:
    folders = ("scripts", "speedrun")
    paths = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


@pytest.fixture(scope="module")
def answers():
    """Ask every command and script for its help, in one process that starts clean."""
    request = json.dumps([HEAVY, list(PIPELINES), script_names()])
    environment = {**os.environ, "COLUMNS": "400", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", ASK_HELP, request],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_command_and_script_answers_help_and_loads_nothing_heavy(answers):
    """Help comes at once, on any machine; heavy imports belong to the pipeline."""
    for name, (code, text, loaded) in answers.items():
        assert code == 0, f"{name} --help ended with {code}"
        assert "usage" in text.lower(), f"{name} --help shows no usage"
        assert not loaded, f"{name} --help loads {loaded}; import inside the function"


def test_every_reader_of_foreign_files_is_listed():
    """SECURITY.md says of each kind of file where it is checked and what damages it."""
    table = (ROOT / "SECURITY.md").read_text()
    rows = re.findall(r"^\| [^|]* \| (`[^|]*`) \| ([^|]*) \|$", table, re.M)
    listed = [name for _, names in rows for name in names.split(", ")]
    source = (ROOT / "tests" / "fuzz" / "readers.py").read_text()
    assert sorted(listed) == sorted(re.findall(r'^        name="([\w-]+)"', source, re.M))
    for checks, _ in rows:
        folder = ""
        for name in re.findall(r"`([\w/.]+)`", checks):
            folder = name.rpartition("/")[0] or folder
            assert (PACKAGE / folder / name.rpartition("/")[2]).is_file(), name


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_hashes_are_of_the_versions_that_are_tested(name):
    """Of all that is asked for but torch; `make lock` writes them."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = {re.sub("[-_.]+", "-", line.partition("==")[0]).lower(): line for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entries = re.split(r"\n(?=\S)", (ROOT / name).read_text(encoding="utf-8").strip())
    assert all(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry) for entry in entries)
    versions = dict(re.split(r"[ ;\\]", entry)[0].split("==") for entry in entries)
    there = versions.keys() & tested.keys()  # the others are of other systems
    assert {name: versions[name] for name in there} == {
        name: tested[name].partition("==")[2] for name in there
    }
    asked = project["dependencies"] + ("dev" in name) * project["optional-dependencies"]["dev"]
    asked = {re.split(r"[>=\[]", one)[0].replace("_", "-") for one in asked}
    assert asked - versions.keys() == {"torch"}


def test_no_code_of_a_model_is_run():
    """Each loader of transformers is told so, whatever its default is."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "speedrun").glob("*.py")]
    calls = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    loads = [
        call
        for call in calls
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("from_pretrained", "from_config")
    ]
    assert len(loads) > 8
    for call in loads:
        said = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert said.get("trust_remote_code") == "False", ast.unparse(call)


def test_the_makefile_runs_what_exists():
    """A target whose script is absent fails only when it is needed."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    absent = [name for name in re.findall(r"[\w/]+\.py\b", text) if not (ROOT / name).is_file()]
    assert not absent, f"write it, or remove the target from the Makefile: {absent}"


FLAG = r"--[a-z][a-z0-9-]*(?:\.[a-z][a-z0-9-]*)*"


def quoted_lines(path: Path) -> list[str]:
    """Return the command lines in a document: its code blocks and inline code, or a script."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    if path.suffix == ".sh":
        return [line.strip() for line in text.splitlines() if not line.lstrip().startswith("#")]
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()] + re.findall(
        r"`([^`\n]+)`", prose
    )


def quoted_commands() -> list[tuple[str, str, list[str]]]:
    """Return (document, command, flags) for each command that a document quotes."""
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "caches" / "README.md"]
    documents += sorted([*(ROOT / "speedrun").glob("*.sh"), *(ROOT / "speedrun").glob("*.md")])
    found = []
    for document in documents:
        for line in quoted_lines(document) if document.is_file() else []:
            for command in re.split(r"&&|\|\||;|\|", line.split(" #")[0]):
                found += read_command(document.relative_to(ROOT).as_posix(), command)
    return found


def read_command(document: str, command: str) -> list[tuple[str, str, list[str]]]:
    """Return the entry of one command line, none when it is not ours."""
    pattern = (
        r"(?:^|[\s/\"$])(qat [a-z][a-z0-9-]+|python (?:scripts|speedrun)/\w+\.py|make [a-z]+)\b"
    )
    called = re.search(pattern, command)
    if not called or re.match(r"\s*(say|echo)\b", command):
        return []
    flags = re.findall(rf"(?:^|[\s\[])({FLAG})", command[called.end() :])
    return [(document, called[1], flags)]


def test_quoted_commands_exist_and_accept_the_quoted_flags(answers):
    """What README, CONTRIBUTING and speedrun quote can be typed as it stands."""
    verbs = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    quoted = quoted_commands()
    assert any(command == "make test" for _, command, _ in quoted), "README quotes `make test`"
    wrong = []
    for document, command, flags in quoted:
        if command.startswith("make "):
            exists, known = command.removeprefix("make ") in verbs, set(flags)
        else:
            exists = command in answers
            known = set(re.findall(FLAG, answers[command][1])) if exists else set()
        if not exists:
            wrong.append(f"{document}: `{command}` does not exist")
        elif not set(flags) <= known:
            wrong.append(f"{document}: `{command}` does not know {sorted(set(flags) - known)}")
    assert not wrong, "\n".join(wrong)
