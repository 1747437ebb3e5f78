"""What every command shares: flags from one dataclass, one line of JSON, one line for an error."""

import contextlib
import errno
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from safetensors import SafetensorError  # loads no torch

from qat.tracking.messages import say

USER_ERRORS = (ValueError, OSError, FloatingPointError, SafetensorError)
NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
BOX_LINES = re.compile(r"[\u2500-\u257f]|^[+|]|[+|]$|-{3,}")  # tyro draws in either alphabet


def run_command(
    name: str,
    config_type: type,
    act: Callable[[Any], dict[str, Any]],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse flags into a config, run the act, print its closing JSON line.

    Args:
        name: The command as typed, for usage lines.
        config_type: Frozen dataclass; its docstring and field docstrings are the help.
        act: Gets the config, returns the values of the closing line.
        argv: Flags; those of the process when not given.

    Returns:
        Exit code: 0, or 2 where the user can fix what is wrong.
    """
    try:
        config = parse_flags(name, config_type, sys.argv[1:] if argv is None else argv)
        closing = act(config)
    except USER_ERRORS as error:
        if os.environ.get("QAT_TRACEBACK"):
            raise
        close_bars()
        say(f"error: {one_line(error)}")
        return 2
    print(json.dumps(closing, allow_nan=False), flush=True)  # noqa: T201 the closing line
    return 0


def parse_flags(name: str, config_type: type, argv: Sequence[str]) -> Any:
    """Return the config that the flags ask for.

    Raises:
        ValueError: If a flag or its value is wrong, on one line.
    """
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config_type, args=list(argv), prog=name)
    except SystemExit as stop:
        if not stop.code:  # --help has been printed
            raise
        raise ValueError(flag_error(said.getvalue(), name)) from None


def flag_error(box: str, name: str) -> str:
    """Return on one line what tyro draws as a box: what is wrong, what may have been meant."""
    lines = [BOX_LINES.sub("", line).strip() for line in box.splitlines()[1:]]
    what = re.split(r"For full helptext|Argument helptext", " ".join(lines))[0]
    what = re.sub(r"^Error parsing \w+Config: ", "", " ".join(what.split()))
    return f"{what.rstrip('.')}; `{name} --help` lists the flags"


def close_bars() -> None:
    """End the progress bars that an error cut short, so that it gets a line of its own."""
    from tqdm import tqdm

    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, with a remedy where the system gave it."""
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        is_full = error.errno in NO_ROOM or not where
        remedy = "free some space or choose another --output" if is_full else "check the path"
        message = f"{where}{error.strerror}; {remedy}"
    if isinstance(error, SafetensorError):  # damaged, or the disk is full: its words tell which
        message = f"{message}; free some space, or make or fetch the damaged file again"
    return message or type(error).__name__
