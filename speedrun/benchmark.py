"""The seeds' name for `qat benchmark`: takes their flags and those of `qat benchmark`."""

import sys

from qat.cli.commands import main
from qat.legacy.flags import benchmark_flags

if __name__ == "__main__":
    raise SystemExit(main("benchmark", benchmark_flags(sys.argv[1:])))
