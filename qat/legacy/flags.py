"""The seeds' flags, translated into those of `qat train` and `qat benchmark`.

`scripts/train_v2_simple.py` takes the flags below in their own sense, and those of `qat train`.
"""

from collections.abc import Sequence

# Flags that keep their value under another name; those that are the same are not listed.
RENAMED = {
    "--v2-checkpoint": "--checkpoint",
    "--lr": "--optim.lr",
    "--warmup-steps": "--optim.warmup-steps",
    "--min-lr-ratio": "--optim.min-lr-ratio",
    "--weight-decay": "--optim.weight-decay",
    "--clip-grad-norm": "--optim.clip-grad-norm",
    "--temperature": "--loss.temperature",
    "--hard-top1": "--loss.hard-weight",
    "--hard-top1-end": "--loss.hard-weight-end",
    "--hard-full": "--loss.hard-weight",
    "--sampled-negatives": "--loss.sampled-negatives",
    "--eval-steps": "--intervals.eval-steps",
    "--eval-samples": "--intervals.eval-samples",
    "--save-steps": "--intervals.save-steps",
    "--keep-checkpoints": "--intervals.keep-checkpoints",
    "--wandb-project": "--tracking.project",
    "--wandb-run": "--tracking.name",
    "--gdrive-dir": "--tracking.copy-to",
}
# Flags without a value, and what they stand for.
SWITCHES = {
    "--mlp-only": ("--layers", "mlp"),
    "--attn-only": ("--layers", "attention"),
    "--g-only": ("--trainable", "magnitudes"),
    "--train-norms-only": ("--trainable", "norms"),
    "--freeze-mags": ("--trainable", "auto", "directions"),
    "--train-lut": ("--trainable", "auto", "codebooks"),
    "--constant-lr": ("--optim.schedule", "constant"),
    "--no-full-logits": ("--loss.sampled-negatives", "4096"),
    "--wandb": ("--tracking.to", "wandb"),
}
BENCHMARK_FLAGS = {"--skip-checkpointing": "--no-gradient-checkpointing"}


def benchmark_flags(argv: Sequence[str]) -> list[str]:
    """Return a seeds' benchmark command line as one of `qat benchmark`."""
    return [BENCHMARK_FLAGS.get(flag.replace("_", "-"), flag) for flag in argv]


def train_flags(argv: Sequence[str]) -> list[str]:
    """Return a seeds' training command line as one of `qat train`."""
    rest: list[str] = []
    given: dict[str, str] = {}
    chosen: dict[str, list[str]] = {}  # from our flag to the switches that stand for it
    queue = list(argv)
    while queue:
        argument = queue.pop(0)
        flag, has_value, value = argument.partition("=")
        flag = flag.replace("_", "-")
        if flag in SWITCHES and not has_value:
            chosen.setdefault(SWITCHES[flag][0], []).append(flag)
        elif flag in RENAMED:
            if not has_value and not queue:
                raise ValueError(f"{flag} lacks its value; give one")
            given[flag] = value if has_value else queue.pop(0)
        else:
            rest.append(argument)
    merge_numbers(given, chosen)
    renamed = [part for flag, value in given.items() for part in (RENAMED[flag], value)]
    switched = [part for ours, flags in chosen.items() for part in (ours, *values_of(flags, rest))]
    return [*renamed, *switched, *rest]


def merge_numbers(given: dict[str, str], chosen: dict[str, list[str]]) -> None:
    """Add up the two names of one hard loss; let negatives count only where they are drawn."""
    full = float_of(given, "--hard-full")
    if full:
        for flag in ("--hard-top1", "--hard-top1-end"):
            if flag in given or flag == "--hard-top1":
                given[flag] = repr(float_of(given, flag) + full)
    given.pop("--hard-full", None)
    drawn = chosen.pop(RENAMED["--sampled-negatives"], None)
    if drawn is None:
        given.pop("--sampled-negatives", None)
    else:
        given.setdefault("--sampled-negatives", SWITCHES[drawn[0]][1])


def float_of(given: dict[str, str], flag: str) -> float:
    """Return a flag's number, 0 where it is not given."""
    try:
        return float(given.get(flag, 0.0))
    except ValueError as error:
        raise ValueError(f"{flag} {given[flag]} is no number; give one such as 0.2") from error


def values_of(flags: list[str], rest: Sequence[str]) -> list[str]:
    """Return the values that switches of one flag of ours stand for."""
    values = {flag: SWITCHES[flag][1:] for flag in flags}
    ours = SWITCHES[flags[0]][0]
    if ours in rest:
        raise ValueError(f"{flags[0]} and {ours} exclude each other; drop one")
    if len(set(values.values())) > 1 and any(value[0] != "auto" for value in values.values()):
        raise ValueError(f"{' and '.join(values)} exclude each other; choose one")
    return list(dict.fromkeys(value for part in values.values() for value in part))


def flags_help() -> str:
    """Return the seeds' flags and what each stands for, a line a flag."""
    stands_for = {**RENAMED, **{flag: " ".join(ours) for flag, ours in SWITCHES.items()}}
    lines = [f"  {flag:<20} {ours}" for flag, ours in stands_for.items()]
    return "\n".join(["flags of the seeds, and the flags below that they stand for:", *lines])
