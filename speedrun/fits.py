"""Measure one way of fitting a student on plain text files: a row of the table in log.md.

Calibration and measurement read blocks of two text files, and kl_nats is against the live teacher's
64 likeliest tokens and one cell for the rest, so no cache is needed.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from qat.cli.command import run_command
from qat.pipelines.quantize_config import Fit
from qat.tracking.messages import say

TOP_K = 64
BATCH = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class FitsConfig:
    """Fit a student by one plan and one method, and measure it before any training."""

    model: str = "models/smollm2-135m"
    """Hugging Face folder of the full-precision model."""
    plan: Annotated[str, tyro.conf.arg(aliases=["--scheme"])] = "q2a4"
    """As in `qat init-student`."""
    fit: Fit = "hessian"
    """As in `qat init-student`."""
    num_blocks: int = 64
    """Blocks of 64 tokens that calibrate."""
    calibration: Path = Path("../shared/data/english_train.txt")
    """Text that calibrates."""
    heldout: Path = Path("../shared/data/english_heldout.txt")
    """Text whose first 64 blocks of 64 tokens are measured."""


def measure_fit(config: FitsConfig) -> dict[str, Any]:
    """Load, fit, measure."""
    import torch

    from qat.calibrate.statistics import collect_second_moments
    from qat.data.text import text_blocks
    from qat.distill.teacher import top_k_signal
    from qat.evaluate.kl import evaluate_batches
    from qat.model.checkpoint import bits_per_weight
    from qat.model.load import load_dense, load_tokenizer
    from qat.model.surgery import dense_weights, hold_weights, model_tensors
    from qat.pipelines.fit_layers import NUMBERED, FitTask, fit_by_decoder_layers, fit_with_moments
    from qat.quant.plan import read_plan
    from qat.runtime.device import Device
    from qat.runtime.memory import peak_rss_bytes

    device = Device.detect("cpu")
    say(device.describe())
    tokenizer = load_tokenizer(config.model)
    batches = text_blocks(config.calibration, tokenizer, 64, config.num_blocks).split(BATCH)
    heldout = text_blocks(config.heldout, tokenizer, 64, 64).split(BATCH)
    model = load_dense(config.model, dtype=device.dtype)
    plan = read_plan(config.plan, model_tensors(model))
    modules = dense_weights(model, plan)
    linears = {name: modules[name] for name in modules if NUMBERED.search(name)}
    task = FitTask(
        specs=plan.quantized, weight_of=lambda name: modules[name].weight, row_weights={}
    )
    with torch.inference_mode():
        counts = torch.ones(BATCH, 63, dtype=torch.bool)
        signals = [top_k_signal(model(ids).logits[:, :-1], counts, TOP_K) for ids in heldout]
    started, started_cpu = time.perf_counter(), time.process_time()
    if config.fit != "moments":
        fit_by_decoder_layers(model, task, batches, dtype=device.dtype)
    else:
        fit_with_moments(model, task, collect_second_moments(model, linears, batches))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    hold_weights(model, device.dtype)
    measured = evaluate_batches(
        model, list(zip(heldout, signals, strict=True)), description="evaluate"
    )
    return {
        "plan": config.plan,
        "fit": config.fit,
        "num_blocks": config.num_blocks,
        **bits_per_weight(model),
        **measured,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_rss_bytes": peak_rss_bytes(),
    }


if __name__ == "__main__":
    raise SystemExit(run_command("python speedrun/fits.py", FitsConfig, measure_fit))
