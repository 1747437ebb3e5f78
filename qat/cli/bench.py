"""`qat bench`: steps and caches as ratios, a conversion in seconds, each in a fresh process."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from qat.benchmark.config import BenchConfig
from qat.cli.command import run_command
from qat.tracking.messages import say

RANK_BATCH = 4  # sequences: what the seeds trained with
CALIBRATION = 64  # sequences: what conversions are compared on
CASES = ("plain", "fake-quant", "rank-by-rank", "formed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat bench", BenchConfig, act, argv)


def act(config: BenchConfig) -> dict[str, Any]:
    """Measure one case here, or all of them in processes of their own."""
    if config.case is not None:
        return measure(config)
    results: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    for _ in range(config.repeats):
        for case in CASES:
            results[case].append(in_fresh_process(config, case))
            last = results[case][-1]
            say(f"{case}: {median(last['seconds']):.2f} s a step, {last['tokens']} tokens")
    seconds = {
        case: median([second for run in runs for second in run["seconds"]])
        for case, runs in results.items()
    }
    peak = {case: median([run["peak_bytes"] for run in runs]) for case, runs in results.items()}
    return {
        "step_time_over_plain": seconds["fake-quant"] / seconds["plain"],
        "rate_over_rank_by_rank": seconds["rank-by-rank"] / seconds["formed"],
        "peak_memory_over_plain": peak["fake-quant"] / peak["plain"],
        **cache_and_conversion(config),
        "seconds": seconds,
        "peak_bytes": peak,
        "tokens_per_step": config.tokens_per_step,
    }


def in_fresh_process(config: BenchConfig, case: str) -> dict[str, Any]:
    """Return what a process measures for one case, the memory of its own included."""
    flags = {
        "model-id": config.model_id,
        "tokens-per-step": config.tokens_per_step,
        "seq-len": config.seq_len,
        "steps": config.steps,
        "dtype": config.dtype,
        "device": config.device,
        "data": config.data,
        "case": case,
    }
    return fresh_command("bench", flags)


def cache_and_conversion(config: BenchConfig) -> dict[str, float]:
    """Build a cache, make a 4-bit student and convert it to 2 bits, as one would by hand."""
    place = {"dtype": config.dtype, "device": config.device}
    with tempfile.TemporaryDirectory() as folder:
        text = {"data": config.data, "seq-len": config.seq_len}
        text |= {"num-sequences": config.num_sequences, "output-dir": folder}
        cache = fresh_command("build-cache", {"teacher": config.model_id, **text, **place})
        ratio = cache["tokens_per_second"] / cache["bare_forward_tokens_per_second"]
        say(f"cache: {cache['tokens_per_second']:.0f} tokens/s, {ratio:.2f} of the bare forward's")
        q4 = Path(folder) / "q4"
        fit = {"cache-dir": cache["cache"], "calibration-sequences": CALIBRATION, **place}
        student = {"model": config.model_id, "output": q4, "fit": "moments", **fit}
        fresh_command("init-student", student, "--no-eval")
        seconds = {}
        for name in ("moments", "hessian"):
            flags = {"q4-checkpoint": q4, "output": Path(folder) / name, "fit": name, **fit}
            seconds[name] = fresh_command("convert-q4-to-q2", flags)["seconds"]
            say(f"conversion, {name}: {seconds[name]:.1f} s")
    return {
        "conversion_seconds": seconds["moments"],
        "default_conversion_seconds": seconds["hessian"],
        "cache_over_bare_forward": ratio,
    }


def fresh_command(command: str, flags: dict[str, Any], *more: str) -> dict[str, Any]:
    """Return the closing values of a command in a process of its own."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "qat", command, *words, *more],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"{command} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(config: BenchConfig) -> dict[str, Any]:
    """Time the steps of one case in this process."""
    from qat.benchmark.ratios import random_batch, time_steps
    from qat.model.load import load_dense
    from qat.runtime.device import Device
    from qat.runtime.memory import peak_rss_bytes
    from qat.train.baselines import make_case

    device = Device.detect(config.device)
    dtype = device.dtype_from_name(config.dtype)
    model = load_dense(config.model_id, dtype=dtype)
    device.place(model)
    by_rank = config.case in ("rank-by-rank", "formed")
    batch_size = RANK_BATCH if by_rank else config.tokens_per_step // config.seq_len
    batch = random_batch(model.config.vocab_size, batch_size, config.seq_len, device.torch_device)
    trainer = make_case(config.case, model, dtype, device.sync)
    seconds = time_steps(
        lambda: trainer.step([batch], 1.0), 1 + config.steps, partial(device.sync, wait=True)
    )[1:]
    return {
        "case": config.case,
        "seconds": seconds,
        "tokens": batch_size * config.seq_len,
        "peak_bytes": device.peak_bytes() or peak_rss_bytes(),
    }
