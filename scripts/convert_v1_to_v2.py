"""The seeds' name for `qat convert-v1-to-v2`."""

from qat.cli.convert_v1_to_v2 import main

if __name__ == "__main__":
    raise SystemExit(main())
