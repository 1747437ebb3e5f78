import errno
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest
from safetensors import SafetensorError
from tqdm import tqdm

from qat import __main__, __version__
from qat.cli.command import one_line, run_command
from qat.cli.commands import PIPELINES
from qat.tracking.messages import say


@dataclass(frozen=True, kw_only=True, slots=True)
class LampConfig:
    """Light a lamp."""

    color: Literal["red", "blue"]
    """What it looks like."""
    watts: int = 5
    """What it takes."""

    def __post_init__(self) -> None:
        if self.watts < 0:
            raise ValueError(f"--watts {self.watts} is negative; give 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class LampResult:
    """What `shine` found."""

    watts: int
    folder: Path


def shine(config):
    """A pipeline that is found by its name."""
    return LampResult(watts=config.watts, folder=Path("lamps") / config.color)


def light(arguments, pipeline=lambda config: {"watts": config.watts}):
    """Run the command with some flags."""
    return run_command("qat lamp", LampConfig, pipeline, arguments)


def raising(error):
    """Return a pipeline that ends with an error."""

    def pipeline(config):
        raise error

    return pipeline


def test_the_closing_line_is_the_only_line_on_standard_output(capsys):
    """One JSON line for machines; numbers stay numbers."""
    assert light(["--color", "red", "--watts", "7"]) == 0
    out, _ = capsys.readouterr()
    assert out.count("\n") == 1
    assert json.loads(out) == {"watts": 7}


def test_a_result_may_be_a_dataclass_of_a_pipeline_that_is_named(capsys, monkeypatch):
    """Fields become keys, paths strings; "module:function" is imported after the flags."""
    module = ModuleType("lamp_pipeline")
    module.shine = shine
    monkeypatch.setitem(sys.modules, "lamp_pipeline", module)
    assert light(["--color", "red"], "lamp_pipeline:shine") == 0
    assert json.loads(capsys.readouterr().out) == {"watts": 5, "folder": "lamps/red"}


def test_messages_go_to_standard_error_while_a_command_runs(capsys):
    """Standard output is for the result alone."""

    def pipeline(config):
        say(f"{config.color} at 100%s")
        return {}

    assert light(["--color", "red"], pipeline) == 0
    assert capsys.readouterr().err == "red at 100%s\n"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("--rank 0 is too small;\n give 1 or more"), "--rank 0 is too small; give 1"),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "caches/x"),
            "caches/x: No such file; check",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "free some space"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error; run the same command"),
        (OSError(errno.ENOSPC, "No space left", "runs/x"), "runs/x: No space left; free some"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "free some space"),
        (SafetensorError("header too small"), "header too small; free some space, or make or"),
        (FloatingPointError("loss is nan at step 3; lower --lr"), "loss is nan at step 3"),
    ],
)
def test_what_a_user_can_fix_is_one_line_and_code_2(error, expected, capsys, monkeypatch):
    """No traceback: what, and what to do."""
    monkeypatch.delenv("QAT_TRACEBACK", raising=False)
    assert light(["--color", "red"], raising(error)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err


def test_an_error_has_a_line_of_its_own_after_a_progress_bar(capsys):
    """The bar that it cut short shared its line."""

    def pipeline(config):
        for number in tqdm(range(3), desc="fit"):
            if number == 1:
                raise ValueError("layer 1: the weight holds NaN")

    assert light(["--color", "red"], pipeline) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: layer 1: the weight holds NaN"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--color", "green"], "invalid choice 'green' for argument '--color'"),
        (["--color", "red", "--watts", "x"], "Error parsing --watts: invalid literal"),
        (["--color", "red", "--wats", "3"], "Unrecognized options: --wats, 3 Perhaps you meant"),
        (["--color", "red", "--watts", "-3"], "error: --watts -3 is negative; give 0 or more"),
        (["--watts", "3"], "Missing from qat lamp: --color {red,blue}"),
        (["--color", "red", "--watts"], "Missing value for argument '--watts'"),
    ],
)
def test_a_wrong_flag_is_one_line_with_key_value_and_remedy(flags, expected, capsys):
    """No box and no traceback: the flag, what is wrong with it, where the flags are listed."""
    assert light(flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert expected in err
    assert "`qat lamp --help` lists the flags" in err


def test_help_is_no_error(capsys):
    """It goes to standard output and ends well."""
    with pytest.raises(SystemExit) as stop:
        light(["--help"])
    assert stop.value.code == 0
    assert "What it takes." in capsys.readouterr().out


def test_our_own_mistakes_keep_their_traceback():
    """A failed assertion is no user's error; it is not hidden."""
    with pytest.raises(AssertionError):
        light(["--color", "red"], raising(AssertionError("a bug")))


def test_a_traceback_can_be_asked_for(monkeypatch):
    """QAT_TRACEBACK=1 shows where an error came from."""
    monkeypatch.setenv("QAT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="why"):
        light(["--color", "red"], raising(ValueError("why")))


def test_an_error_without_words_is_named():
    """An empty message would leave an empty line."""
    assert one_line(ValueError()) == "ValueError"


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_number_that_is_not_finite_ends_in_one_line_with_its_key(number, capsys):
    """JSON has no NaN; it ended in a traceback of `json.dumps` that named no key."""
    result = {"loss": 1.0, "rows": [{"kl": 0.5}, {"kl": float(number)}]}
    assert light(["--color", "red"], lambda config: result) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: rows.1.kl is {number}: ")
    assert err.count("\n") == 1


def test_qat_alone_lists_its_commands(capsys, monkeypatch):
    """The list is the help."""
    monkeypatch.setattr("sys.argv", ["qat"])
    assert __main__.main() == 0
    out = capsys.readouterr().out
    assert all(name in out for name in PIPELINES)


def test_the_version_is_told(monkeypatch, capsys):
    """As `qat doctor` and the records of runs say it."""
    monkeypatch.setattr(sys, "argv", ["qat", "--version"])
    assert __main__.main() == 0
    assert capsys.readouterr().out == f"qat {__version__}\n"


def test_an_unknown_command_is_one_line_with_the_choices(capsys, monkeypatch):
    """A typo shows what could have been meant."""
    monkeypatch.setattr("sys.argv", ["qat", "trian"])
    assert __main__.main() == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "'trian'" in err
    assert "train" in err


@dataclass(frozen=True)
class Nothing:
    """No flags."""


def test_an_own_mistake_is_no_user_error(monkeypatch, capsys):
    """A ValueError of `zip(strict=True)` in the package used to be shown as the user's fault."""
    module = ModuleType("qat.made_up")
    source = "def pair(a, b):\n    return list(zip(a, b, strict=True))\n"
    exec(compile(source, "made_up.py", "exec"), module.__dict__)  # noqa: S102 its own module
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        run_command("qat x", Nothing, lambda _config: module.pair([1, 2], [1]), [])
    capsys.readouterr()

    def refuse(_config):
        raise ValueError("--x 3 must be 2; give 2")

    assert run_command("qat x", Nothing, refuse, []) == 2
    assert "error: --x 3 must be 2; give 2" in capsys.readouterr().err
    assert run_command("qat x", Nothing, lambda _config: json.loads("{"), []) == 2
