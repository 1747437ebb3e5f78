"""What every command shares: flags from one dataclass, one line of JSON, one line for an error."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

USER_ERRORS = (ValueError, OSError)


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
    import tyro

    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        config = tyro.cli(config_type, args=arguments, prog=name)
        closing = act(config)
    except USER_ERRORS as error:
        if os.environ.get("QAT_TRACEBACK"):
            raise
        say(f"error: {one_line(error)}")
        return 2
    print(json.dumps(closing, allow_nan=False), flush=True)  # noqa: T201 the closing line
    return 0


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, with its file where the message lacks it."""
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        message = f"{error.strerror}; free some space or choose another --output"
    return message or type(error).__name__


def say(text: str) -> None:
    """Print a line for people, on standard error; standard output is for JSON."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201 the one place that speaks
