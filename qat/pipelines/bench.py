"""Measure steps and caches as ratios and conversions in seconds, each in a fresh process."""

import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from qat.benchmark.config import BenchConfig
from qat.benchmark.probes import run_fresh
from qat.benchmark.throughput import random_batch, time_steps
from qat.model.load import load_dense
from qat.pipelines.benchmark import as_arguments
from qat.reports.log import command_line
from qat.runtime.device import Device
from qat.runtime.memory import peak_rss_bytes
from qat.tracking.messages import say
from qat.train.baselines import make_case
from qat.train.step import Batch

RANK_BATCH = 4  # sequences: what the seeds trained with
CALIBRATION = 64  # sequences: what conversions are compared on
CASES = ("plain", "fake-quant", "rank-by-rank", "formed")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchResult:
    """What training, a cache and a conversion cost."""

    step_time_over_plain: float
    """Seconds of a training step over those of plain fine-tuning."""
    rate_over_rank_by_rank: float
    """Speed of one matmul a layer over that of the seeds' sum over ranks."""
    peak_memory_over_plain: float
    """Peak memory over that of plain fine-tuning."""
    conversion_seconds: float
    """Conversion from 4 to 2 bits with the quick fit."""
    default_conversion_seconds: float
    """The same with the default fit."""
    cache_over_bare_forward: float
    """Tokens a second of building a cache over those of the teacher's forward pass alone."""
    seconds: dict[str, float]
    """Median step of each case."""
    peak_bytes: dict[str, float]
    """Median peak memory of each case."""
    tokens_per_step: int
    """Tokens of a step in the comparison with plain fine-tuning."""


def bench(config: BenchConfig) -> BenchResult | dict[str, Any]:
    """Measure all cases in processes of their own; with `case`, that one in this process."""
    if config.case is not None:
        return measure(config)
    results: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    for _ in range(config.repeats):
        for case in CASES:
            results[case].append(in_fresh_process("bench", {**asdict(config), "case": case}))
            last = results[case][-1]
            say(f"{case}: {median(last['seconds']):.2f} s a step, {last['tokens']} tokens")
    seconds = {
        case: median([second for run in runs for second in run["seconds"]])
        for case, runs in results.items()
    }
    peak = {case: median([run["peak_bytes"] for run in runs]) for case, runs in results.items()}
    return BenchResult(
        step_time_over_plain=seconds["fake-quant"] / seconds["plain"],
        rate_over_rank_by_rank=seconds["rank-by-rank"] / seconds["formed"],
        peak_memory_over_plain=peak["fake-quant"] / peak["plain"],
        **measure_cache_and_conversion(config),
        seconds=seconds,
        peak_bytes=peak,
        tokens_per_step=config.tokens_per_step,
    )


def measure_cache_and_conversion(config: BenchConfig) -> dict[str, float]:
    """Build a cache, make a 4-bit student and convert it to 2 bits, as one would by hand."""
    place = {"dtype": config.dtype, "device": config.device}
    with tempfile.TemporaryDirectory() as folder:
        text = {"data": config.data, "seq_len": config.seq_len}
        text |= {"num_sequences": config.num_sequences, "output_dir": folder}
        cache = in_fresh_process("build-cache", {"teacher": config.model_id, **text, **place})
        ratio = cache["tokens_per_second"] / cache["bare_forward_tokens_per_second"]
        say(f"cache: {cache['tokens_per_second']:.0f} tokens/s, {ratio:.2f} of the bare forward's")
        q4 = Path(folder) / "q4"
        fit = {"cache_dir": cache["cache"], "calibration_sequences": CALIBRATION, **place}
        student = {"model": config.model_id, "output": q4, "fit": "moments", "eval": False, **fit}
        in_fresh_process("init-student", student)
        seconds = {}
        for name in ("moments", "hessian"):
            flags = {"q4_checkpoint": q4, "output": Path(folder) / name, "fit": name, **fit}
            seconds[name] = in_fresh_process("convert-q4-to-q2", flags)["seconds"]
            say(f"conversion, {name}: {seconds[name]:.1f} s")
    return {
        "conversion_seconds": seconds["moments"],
        "default_conversion_seconds": seconds["hessian"],
        "cache_over_bare_forward": ratio,
    }


def in_fresh_process(command: str, flags: dict[str, Any]) -> dict[str, Any]:
    """Return the closing values of a command in a process of its own."""
    result = run_fresh(as_arguments(command_line(f"qat {command}", flags, {})))
    if result.get("status") == "OOM":
        raise ValueError(f"qat {command} does not fit into memory: {result['why']}")
    return result


def measure(config: BenchConfig) -> dict[str, Any]:
    """Time the steps of one case in this process."""
    device = Device.detect(config.device)
    dtype = device.dtype_from_name(config.dtype)
    model = load_dense(config.model_id, dtype=dtype)
    device.place(model)
    by_rank = config.case in ("rank-by-rank", "formed")
    batch_size = RANK_BATCH if by_rank else config.tokens_per_step // config.seq_len
    shape = (batch_size, config.seq_len)
    batch = Batch.of(*random_batch(model.config.vocab_size, *shape, device.torch_device))
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
