"""The seeds' name for `qat convert-q4-to-q2`."""

from qat.cli.commands import main

if __name__ == "__main__":
    raise SystemExit(main("convert-q4-to-q2"))
