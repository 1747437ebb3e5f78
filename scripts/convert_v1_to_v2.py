"""The seeds' name for `qat convert-v1-to-v2`."""

from qat.cli.commands import main

if __name__ == "__main__":
    raise SystemExit(main("convert-v1-to-v2"))
