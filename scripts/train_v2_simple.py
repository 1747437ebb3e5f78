"""The seeds' name for `qat train`."""

from qat.commands.train import main

if __name__ == "__main__":
    raise SystemExit(main())
