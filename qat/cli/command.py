"""What every command shares: flags from a dataclass, one line of JSON, one line for an error."""

import contextlib
import inspect
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError  # loads no torch

from qat.runtime.launch import is_first, num_processes, rank
from qat.storage.addresses import require_paths
from qat.storage.decode import is_own_mistake
from qat.storage.files import DISK_FULL, read_json
from qat.tracking.messages import LOGGER, messages_on_standard_error
from qat.tracking.record import SETTINGS, config_from_json

USER_ERRORS = (ValueError, OSError, FloatingPointError, SafetensorError)
BOX_LINES = re.compile(r"[\u2500-\u257f]|^[+|]|[+|]$|-{3,}")  # tyro draws in either alphabet
CONFIG_FLAG_HELP = (
    "--config RUN/config.json takes all flags as that run records them; flags on the command line "
    "win, so a run is reproduced by --config and another --output-dir."
)

Config = TypeVar("Config")


def run_command(
    name: str,
    config_type: type[Config],
    pipeline: str | Callable[[Config], object],
    argv: Sequence[str] | None = None,
    *,
    has_config_flag: bool = False,
    is_shared: bool = False,
) -> int:
    """Parse flags into a config, run the pipeline, print its result as one line of JSON.

    Args:
        name: The command as typed, for usage lines.
        config_type: Frozen dataclass; its docstring and field docstrings are the help.
        pipeline: Function from the config to the result, a dataclass or a dict; as
            "module:function" it is imported after the flags are parsed, so that help is quick.
        argv: Flags; those of the process when not given.
        has_config_flag: Whether `--config FILE` takes the flags that a run's config.json records;
            those given on the command line win.
        is_shared: Whether several processes can do the work together.

    Returns:
        Exit code: 0, or 2 where the user can fix what is wrong.
    """
    with messages_on_standard_error():
        try:
            with first_failure_alone():
                if num_processes() > 1 and not is_shared:
                    raise ValueError(f"`{name}` runs in one process; call it without torchrun")
                arguments = list(sys.argv[1:] if argv is None else argv)
                recorded = take_config(arguments, config_type) if has_config_flag else None
                config = parse_flags(
                    name, config_type, arguments, recorded, has_config_flag=has_config_flag
                )
                line = closing_line(find_function(pipeline)(config))
        except USER_ERRORS as error:
            if os.environ.get("QAT_TRACEBACK") or is_own_mistake(error):
                raise
            close_bars()
            who = "" if num_processes() == 1 else f"rank {rank()}: "
            LOGGER.error(f"error: {who}{one_line(error)}")
            return 2
    if is_first():
        print(line, flush=True)  # noqa: T201 the closing line
    return 0


@contextmanager
def first_failure_alone() -> Iterator[None]:
    """Of several processes let the first that fails tell why; torchrun ends the others."""
    try:
        yield
    except Exception as error:
        if num_processes() == 1:
            raise
        from qat.runtime.distributed import is_first_to_fail, is_lost_connection

        if not is_first_to_fail():
            raise SystemExit(2) from None
        if is_lost_connection(error):
            why = " ".join(str(error).partition(". ")[0].split())
            raise ConnectionError(
                f"another process has gone ({why}); run the same command again to resume"
            ) from error
        error.add_note(f"in the process of rank {rank()}")
        raise


def find_function(pipeline: str | Callable[[Config], object]) -> Callable[[Config], object]:
    """Return a function, imported where it is given as "module:function"."""
    if not isinstance(pipeline, str):
        return pipeline
    module, _, function = pipeline.partition(":")
    return getattr(import_module(module), function)


def take_config(arguments: list[str], config_type: type[Config]) -> Config | None:
    """Take `--config FILE` out of a command line; return the config that the file records."""
    places = [n for n, one in enumerate(arguments) if one.partition("=")[0] == "--config"]
    if not places:
        return None
    flag, _, path = arguments.pop(places[0]).partition("=")
    if not path and places[0] < len(arguments):
        path = arguments.pop(places[0])
    if not Path(path).is_file():
        raise ValueError(f"{flag} {path or 'without a value'} is no file; give RUN/config.json")
    values = read_json(Path(path))
    try:
        if isinstance(values, dict) and SETTINGS in values:
            values = values[SETTINGS]
        return config_from_json(config_type, values)
    except ValueError as error:
        raise ValueError(f"{flag} {path}: {error}; correct the file, or give flags") from error


def parse_flags(
    name: str,
    config_type: type[Config],
    argv: Sequence[str],
    recorded: Config | None = None,
    *,
    has_config_flag: bool = False,
) -> Config:
    """Return the config that the flags ask for, over a recorded one if it is given."""
    import tyro

    settings = {} if recorded is None else {"default": recorded}
    if has_config_flag:
        settings["description"] = f"{inspect.getdoc(config_type)}\n\n{CONFIG_FLAG_HELP}"
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            config = tyro.cli(config_type, args=list(argv), prog=name, **settings)
    except SystemExit as stop:
        if not stop.code:  # --help has been printed
            raise
        raise ValueError(flag_error(printed.getvalue(), name)) from None
    require_paths(config)
    return config


def flag_error(box: str, name: str) -> str:
    """Return on one line what tyro draws as a box: what is wrong, what may have been meant."""
    lines = [BOX_LINES.sub("", line).strip() for line in box.splitlines()[1:]]
    what = re.split(r"For full helptext|Argument helptext", " ".join(lines))[0]
    what = re.sub(r"^Error parsing \w+: ", "", " ".join(what.split()))
    return f"{what.rstrip('.')}; `{name} --help` lists the flags"


def closing_line(result: object) -> str:
    """Return a result, a dataclass or a dict, as one line of JSON; paths become strings."""
    values = result
    if is_dataclass(result) and not isinstance(result, type):
        values = result.to_json() if hasattr(result, "to_json") else asdict(result)
    for key, number in not_finite(values):
        raise ValueError(
            f"{key} is {number}: the student computes no finite numbers; "
            "train with a lower --lr, or use --dtype fp32"
        )
    return json.dumps(values, allow_nan=False, default=os.fspath)


def not_finite(values: object, key: str = "") -> Iterator[tuple[str, float]]:
    """Yield key, joined with dots, and value of each number that is NaN or infinite."""
    if isinstance(values, float) and not math.isfinite(values):
        yield key, values
    items = values.items() if isinstance(values, dict) else ()
    items = enumerate(values) if isinstance(values, list | tuple) else items
    for name, value in items:
        yield from not_finite(value, f"{key}.{name}" if key else str(name))


def close_bars() -> None:
    """End the progress bars that an error cut short, so that it gets a line of its own."""
    from tqdm import tqdm

    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, with a remedy where the system gave it."""
    # What others named may hold signs that steer a terminal.
    message = "".join(sign if sign.isprintable() else " " for sign in str(error))
    message = " ".join(message.split())
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        remedy = "check the path" if where else "run the same command again"
        if error.errno in DISK_FULL:
            remedy = "free some space or choose another --output"
        message = f"{where}{error.strerror}; {remedy}"
    if isinstance(error, OSError) and not error.strerror and ";" not in message:  # of a library
        message = f"{message}; check the path"
    if isinstance(error, SafetensorError):  # damaged, or the disk is full: its message tells which
        message = f"{message}; free some space, or make or fetch the damaged file again"
    return message or type(error).__name__
