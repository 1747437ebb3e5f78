"""`qat <command>`: runs the command of that name."""

import inspect
import sys

from qat import __version__
from qat.cli import commands


def main() -> int:
    """Run `qat <command> [flags]`."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: qat <command> [flags]\n")  # noqa: T201
        for name in commands.PIPELINES:
            what = inspect.getdoc(commands.config_of(name)).splitlines()[0]
            print(f"  {name:<18}{what}")  # noqa: T201
        print("\nqat <command> --help lists its flags")  # noqa: T201
        return 0
    if sys.argv[1] == "--version":
        print(f"qat {__version__}")  # noqa: T201
        return 0
    command = sys.argv[1]
    if command not in commands.PIPELINES:
        known = ", ".join(commands.PIPELINES)
        print(f"error: command {command!r} is not one of {known}", file=sys.stderr)  # noqa: T201
        return 2
    return commands.main(command, sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
