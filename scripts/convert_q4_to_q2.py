"""The seeds' name for `qat convert-q4-to-q2`."""

from qat.cli.convert_q4_to_q2 import main

if __name__ == "__main__":
    raise SystemExit(main())
