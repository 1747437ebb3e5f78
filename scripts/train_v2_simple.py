"""The seeds' name for `qat train`: takes their flags and those of `qat train`."""

import sys

from qat.cli.commands import main
from qat.legacy.flags import flags_help, train_flags

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(flags_help(), flush=True)
    try:
        argv = train_flags(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(main("train", argv))
