"""Device tests, and what a GPU makes of training: rates, memory, largest batch.

    make gpu
    python speedrun/gpu.py --device cpu --shape tiny --skip-tests

Needs torch, transformers and what these bring; installs and fetches nothing. The device tests run
first where pytest is there. The last line on standard output is the table as JSON.
"""

# ruff: noqa: T201 it talks to a terminal
import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Run the tests and every measurement; print the table and the values."""
    options = parse(sys.argv[1:])
    sys.path.insert(0, str(ROOT))
    stand_in_for_msgspec()
    from qat.pipelines.training_rates import RatesConfig, measure_training, table
    from qat.tracking.messages import messages_on_standard_error, say

    tests = None if options.skip_tests else run_device_tests()
    config = RatesConfig(
        device=options.device,
        shape=options.shape,
        lengths=tuple(options.lengths),
        compile=("on", "off") if options.compile == "both" else (options.compile,),
        most_tokens=options.most_tokens,
    )
    with messages_on_standard_error():
        values = measure_training(config)
        say(table(values))
        say(f"device tests: {tests['summary'] if tests else 'left out'}")
    print(json.dumps(values | {"tests": tests}))
    return 0 if tests is None or tests["passed"] else 1


def parse(words: list[str]) -> argparse.Namespace:
    """Return the flags; by argparse, as nothing else is sure to be there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="as every command takes it")
    parser.add_argument("--shape", default="qwen3-0.6b", help="or tiny")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 1024], help="of blocks")
    parser.add_argument("--compile", choices=["on", "off", "both"], default="both")
    parser.add_argument("--most-tokens", type=int, default=2**19, help="of a step")
    parser.add_argument("--skip-tests", action="store_true", help="leave the device tests out")
    return parser.parse_args(words)


def stand_in_for_msgspec() -> None:
    """Let modules that check files be imported without what they check by; none is read here."""
    try:
        import msgspec  # noqa: F401
    except ImportError:
        module = ModuleType("msgspec")
        module.Meta, module.ValidationError = lambda **_bounds: None, ValueError
        sys.modules["msgspec"] = module


def run_device_tests() -> dict[str, Any]:
    """Run the tests that need an accelerator, in a process of their own; return how they ended."""
    if find_spec("pytest") is None:
        return {"passed": True, "summary": "pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "device", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    print(done.stdout, file=sys.stderr)
    lines = done.stdout.strip().splitlines() or ["no output"]
    return {"passed": done.returncode == 0, "summary": lines[-1]}


if __name__ == "__main__":
    sys.exit(main())
