"""`qat <command>`: runs the command of that name."""

import sys

from qat.cli import commands

COMMANDS = {
    "fetch": "get a model, a checkpoint or a cache, checked",
    "build-cache": "write the teacher's logits on a data set, once",
    "inspect-cache": "show what a cache holds",
    "convert-cache": "write a cache of the seeds' form in ours",
    "pack": "make one archive of a run or a cache",
    "push": "put a cache, a run or a checkpoint into a store",
    "compress": "make the best file of a size",
    "frontier": "show the best file of many sizes, next to other programs'",
    "plan": "show the format of every tensor and the bytes of the file",
    "init-student": "quantize a full-precision model",
    "convert-q4-to-q2": "make a 2-bit student from a 4-bit one",
    "convert-v1-to-v2": "convert a V1 checkpoint",
    "snap-fp16": "round every stored number of a student to float16",
    "convert": "convert a student to another plan",
    "train": "distil the teacher into a student",
    "evaluate": "measure a student on held-out text",
    "generate": "answer prompts",
    "export": "write a student in another program's format",
    "parity": "compare an exported file in its runtime with the student",
    "benchmark": "find the largest batch that fits, and the fastest one",
    "bench": "compare training steps with plain fine-tuning, as ratios",
    "log-run": "write a run into the speedrun log",
    "compare": "compare runs in one table",
    "doctor": "show the device and what is installed",
    "demo": "run the whole path on SmolLM2-135M",
}


def main() -> int:
    """Run `qat <command> [flags]`."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        listing = "\n".join(f"  {name:<18}{what}" for name, what in COMMANDS.items())
        print(f"usage: qat <command> [flags]\n\n{listing}\n\nqat <command> --help lists its flags")  # noqa: T201
        return 0
    command = sys.argv[1]
    if command not in COMMANDS:
        print(f"error: command {command!r} is not one of {', '.join(COMMANDS)}", file=sys.stderr)  # noqa: T201
        return 2
    return commands.main(command, sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
