"""What the tests of commands share: a teacher, its cache and students, made once by commands."""

import contextlib
import io
import json
from types import SimpleNamespace

import pytest

from qat.cli.commands import main
from tests.tiny import quick_fits, tiny_cache, tiny_llama

QUICK = ("--device", "cpu", "--dtype", "fp32")


@pytest.fixture(scope="session")
def run():
    """Run a command in this process, by quick fits: exit code, closing values, lines to read."""

    def run(command, **flags):
        words = []
        for name, value in flags.items():
            flag = f"--{name.replace('_', '-')}"
            if value is True:
                words.append(flag)
            elif value is False:
                words.append(f"--no-{flag[2:]}")
            elif isinstance(value, (tuple, list)):
                words += [flag, *map(str, value)]
            elif value is not None:
                words += [flag, str(value)]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), quick_fits():
            code = main(command, [*words, *(() if "device" in flags else QUICK)])
        lines = out.getvalue().splitlines()
        closing = json.loads(lines[-1]) if lines else None
        return SimpleNamespace(code=code, closing=closing, lines=lines, said=err.getvalue())

    return run


@pytest.fixture(scope="session")
def refused(run):
    """Run a command that must end in one line and code 2; return that line."""

    def refused(command, **flags):
        done = run(command, **flags)
        assert done.code == 2, done.said
        assert done.lines == []
        assert "Traceback" not in done.said
        last = done.said.rstrip("\n").splitlines()[-1]
        assert last.startswith("error: ")
        return last

    return refused


@pytest.fixture(scope="session")
def path(run, tmp_path_factory):
    """The path from a teacher to a 2-bit student; no test changes what lies there."""
    folder = tmp_path_factory.mktemp("path")
    cache = tiny_cache(folder, tiny_llama())
    q4 = run(
        "init-student",
        model=folder / "teacher",
        plan="q4a4",
        cache_dir=cache,
        output=folder / "q4",
    )
    q2 = run(
        "convert-q4-to-q2",
        q4_checkpoint=folder / "q4",
        cache_dir=cache,
        output=folder / "q2",
        eval=True,
    )
    assert (q4.code, q2.code) == (0, 0), q4.said + q2.said
    return SimpleNamespace(
        folder=folder,
        teacher=folder / "teacher",
        cache=cache,
        q4=folder / "q4",
        q2=folder / "q2",
        closing={"q4": q4.closing, "q2": q2.closing},
    )
