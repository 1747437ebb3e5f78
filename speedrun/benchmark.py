"""The seeds' name for `qat benchmark`."""

from qat.cli.commands import main

if __name__ == "__main__":
    raise SystemExit(main("benchmark"))
