"""The rules of the house, checked on the source itself. Each failure says what to do instead.

The floors are read from the map in README.md, so a room is declared in one place.
"""

import ast
import json
import os
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from qat.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qat"
DRAWERS = {"utils", "common", "helpers", "misc", "core", "base"}
HEAVY = ["torch", "torch_xla", "torch_tpu", "wandb", "transformers", "matplotlib", "sklearn"]
# Library to the only places that may import it (a file, or a folder by its prefix).
OWNERS = {
    "torch_xla": ("runtime/device.py",),
    "torch_tpu": ("runtime/device.py",),
    "wandb": ("tracking/sinks.py",),
    "sklearn": ("grids/codebook.py",),
    "mlx": ("export/to_mlx.py",),
    "coremltools": ("export/to_coreml",),
    "compressed_tensors": ("export/to_compressed_tensors.py",),
}
DEVICE_NAMES = re.compile(r"torch\.(cuda|mps|tpu|xpu|accelerator|backends\.(cuda|mps))\b")
DEVICE_WORDS = {"cuda", "mps", "xla", "tpu"}
# Help of every command and script from one process, with the heavy modules each one loaded.
ASK_HELP = """
import contextlib, importlib, io, json, runpy, sys
heavy, doors, scripts = json.loads(sys.argv[1])
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
for door in doors:
    module = importlib.import_module("qat.cli." + door.replace("-", "_"))
    ask("qat " + door, lambda: module.main(["--help"]))
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


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def read_map() -> dict[str, tuple[int, int]]:
    """Return each room of README's map with its floor and its place on it."""
    rooms = {}
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"(\d) \w+ +((?:[\w]+(?:/|\.py) *)+)", line):
            for place, room in enumerate(found[2].split()):
                rooms[room.removesuffix("/").removesuffix(".py")] = (int(found[1]), place)
    return rooms


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


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
        wanted = imports_of(path)
        exact = {other for other in wanted if other in modules}
        parents = {other.rpartition(".")[0] for other in wanted - exact}
        graph[name] = (exact | (parents & modules.keys())) - {name, "qat"}
    return graph


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_the_map_in_the_readme_equals_the_tree():
    """Every room stands on one floor of the map, and the map names nothing else."""
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert set(read_map()) == files | folders, "mend the map in README.md (or the tree)"


def test_a_module_imports_only_lower_floors_or_its_own_folder():
    """Sideways is passed as an argument and wired in the door; ground stands in map order."""
    rooms, wrong = read_map(), []
    for module, imported in import_graph().items():
        if module in ("qat", "qat.__main__"):
            continue
        here = room_of(module)
        for other in imported:
            there = room_of(other)
            (floor, place), (low, low_place) = rooms[here], rooms[there]
            in_order = floor == low <= 2 and low_place < place
            if here != there and low >= floor and not in_order:
                wrong.append(f"{module} (floor {floor}) imports {other} (floor {low})")
    assert not wrong, f"pass it as an argument from the door instead: {wrong}"


def test_no_import_goes_round():
    """Also imports inside functions count: a hidden circle is a circle."""
    try:
        TopologicalSorter(import_graph()).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other, move what they share down: {error.args[1]}")


def test_the_package_root_says_nothing_false_of_the_floors():
    """The docstring of `qat` may name fewer rooms than the map, never another floor."""
    rooms = read_map()
    docstring = ast.get_docstring(parse(PACKAGE / "__init__.py"))
    for floor, line in re.findall(r"^(\d)\. (.*)$", docstring, re.MULTILINE):
        for room in re.findall(r"`(\w+)`", line):
            assert rooms.get(room, (int(floor),))[0] == int(floor), f"{room} in qat/__init__.py"


def test_one_level_of_folders_and_no_drawer():
    """Names say what is inside; folders hold files, not folders."""
    for path in python_files():
        assert len(path.relative_to(PACKAGE).parts) <= 2, f"{inside(path)} lies too deep"
        assert not DRAWERS & {path.stem, path.parent.name}, f"{inside(path)}: name what it holds"


def test_init_files_hold_a_docstring_only():
    """What lives here and in what order to read it; no re-exports."""
    for path in PACKAGE.rglob("__init__.py"):
        body = parse(path).body
        assert ast.get_docstring(parse(path)), f"{inside(path)} needs a docstring"
        extra = [node for node in body[1:] if not ast.unparse(node).startswith("__version__")]
        assert not extra, f"{inside(path)}: import from the module itself instead"


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


def door_names() -> list[str]:
    """Return the commands: modules with a `main`; what doors share has none."""
    doors = [
        path.stem.replace("_", "-")
        for path in (PACKAGE / "cli").glob("*.py")
        if any(
            isinstance(node, ast.FunctionDef) and node.name == "main" for node in parse(path).body
        )
    ]
    return sorted(doors)


def script_names() -> list[str]:
    folders = ("scripts", "speedrun")
    paths = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


@pytest.fixture(scope="module")
def answers():
    """Ask every command and script for its help, in one process that starts clean."""
    request = json.dumps([HEAVY, door_names(), script_names()])
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


def test_every_command_of_the_list_has_its_door():
    """`qat --help` lists the doors that exist, all of them."""
    assert sorted(COMMANDS) == door_names(), "COMMANDS in qat/__main__.py and qat/commands differ"


def test_every_command_and_script_answers_help_and_loads_nothing_heavy(answers):
    """Help comes at once, on any machine; heavy imports belong inside the act."""
    for name, (code, text, loaded) in answers.items():
        assert code == 0, f"{name} --help ended with {code}"
        assert "usage" in text.lower(), f"{name} --help shows no usage"
        assert not loaded, f"{name} --help loads {loaded}; import inside the function"


def test_the_makefile_runs_what_exists():
    """A verb whose script is absent is a promise that is not kept."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    absent = [name for name in re.findall(r"[\w/]+\.py\b", text) if not (ROOT / name).is_file()]
    assert not absent, f"write it, or remove the verb from the Makefile: {absent}"


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
    flags = re.findall(r"(?:^|[\s\[])(--[a-z][a-z0-9-]*)", command[called.end() :])
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
            known = set(re.findall(r"--[a-z][a-z0-9-]*", answers[command][1])) if exists else set()
        if not exists:
            wrong.append(f"{document}: `{command}` does not exist")
        elif not set(flags) <= known:
            wrong.append(f"{document}: `{command}` does not know {sorted(set(flags) - known)}")
    assert not wrong, "\n".join(wrong)
