"""What a device makes of training: tokens a second, share of its peak, memory, largest batch.

Needs torch, transformers and what these bring, no more: machines with a GPU are often bare. Weights
are random, which costs what trained ones do.

Shape legend: B batch, L tokens of a block.
"""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from qat.benchmark.throughput import flops_per_token, peak_flops, random_batch, time_steps
from qat.cache.codec import pack_top_k
from qat.distill.kl import forward_kl
from qat.model import surgery
from qat.model.head import hidden_states, logits_of
from qat.pipelines import fit_layers
from qat.quant.plan import parse_plan
from qat.runtime.device import Device, dtype_name
from qat.tracking.messages import say
from qat.train.baselines import RATE, make_case, plan_of, round_linears
from qat.train.step import Batch, Trainer
from qat.train.trainable import (
    choose_trainable,
    compile_decoder_layers,
    make_optimizer,
    trained_layers,
)

QWEN3 = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# Positions must reach the longest block.
SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3-0.6b": lambda: Qwen3Config(**QWEN3, max_position_embeddings=4096),
    "tiny": lambda: LlamaConfig(**TINY, max_position_embeddings=4096),
}
# The Speedrun Log's Qwen3-0.6B, L64: tokens a second on an H100 and on a B200.
SEEDS = {"H100": 1182, "B200": 1582}
FIRST_TOKENS = 2**12  # of a step: what batches double from
MOST_TOKENS = 2**19
NUM_STEPS = 5
WARM_UP_STEPS = 3
RATIO_TOKENS = 2**14  # of a step that is compared with plain fine-tuning
FIT_TOKENS, FIT_PLAN = 2**15, "deploy"
TOP_K = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class RatesConfig:
    """What is measured."""

    device: str = "cuda"
    shape: str = "qwen3-0.6b"
    """Of `SHAPES`."""
    lengths: tuple[int, ...] = (64, 1024)
    """Tokens of a block."""
    compile: tuple[Literal["on", "off"], ...] = ("on", "off")
    """Decoder layers compiled, or not."""
    most_tokens: int = MOST_TOKENS
    """Of a step."""


def measure_training(config: RatesConfig) -> dict[str, Any]:
    """Return the rates of training, of a cache and of a fit; tell each as it is known."""
    device = Device.detect(config.device)
    say(device.describe())
    values: dict[str, Any] = {
        "chip": device.chip() or device.kind,
        "torch": torch.__version__,
        "shape": config.shape,
        "dtype": dtype_name(device.dtype),
        "rows": [],
    }
    for seq_len in config.lengths:
        for mode in ("mlp", "e2e"):
            for compiled in config.compile:
                row = measure_rates(device, config, seq_len, mode, compiled)
                values["rows"].append(row)
                say(row_text(row))
    values["step_over_plain"] = step_over_plain(device, config)
    values["cache"] = cache_rate(device, config)
    empty(device)
    values["fit_seconds"] = fit_seconds(device, config)
    return values


def make_model(device: Device, config: RatesConfig) -> nn.Module:
    """Return a model of the shape, of random weights, in the compute dtype on the device."""
    torch.manual_seed(0)
    with device.torch_device:
        shape = SHAPES[config.shape]()
        model = AutoModelForCausalLM.from_config(shape, dtype=device.dtype, trust_remote_code=False)
    return model.eval()


def make_trainer(
    device: Device, config: RatesConfig, mode: str, compiled: str
) -> tuple[nn.Module, Trainer]:
    """Return a student whose MLP layers, or all, train: weights and scales."""
    model = make_model(device, config)
    round_linears(model, plan_of(model))
    kinds = ("mlp",) if mode == "mlp" else ("mlp", "attention")
    chosen = choose_trainable(
        model, kinds=kinds, parts=("weights", "scales"), weight_of=lambda _name: None
    )
    surgery.hold_weights(model, device.dtype)
    compile_decoder_layers(model, compiled)
    trainer = Trainer(
        model=model,
        layers=trained_layers(model),
        optimizer=make_optimizer(chosen, dict.fromkeys(chosen, RATE)),
        divergence=forward_kl,
        dtype=device.dtype,
        clip_grad_norm=1.0,
        sync=device.sync,
    )
    return model, trainer


def measure_rates(
    device: Device, config: RatesConfig, seq_len: int, mode: str, compiled: str
) -> dict[str, Any]:
    """Return tokens a second of batches that double until one does not fit; the best of them."""
    model, trainer = make_trainer(device, config, mode, compiled)
    flops = flops_per_token(model, trainer.layers)
    peak = peak_flops(device.chip(), dtype_name(device.dtype))
    found: list[dict[str, Any]] = []
    for size in batch_sizes(seq_len, config.most_tokens):
        try:
            found.append(measure_batch(device, trainer, model, size, seq_len))
        except (RuntimeError, MemoryError) as error:
            if not device.is_out_of_memory(error):
                raise
            break
    del model, trainer
    empty(device)
    if not found:
        return {"mode": mode, "seq_len": seq_len, "compile": compiled, "tokens_per_second": None}
    best = max(found, key=lambda row: row["tokens_per_second"])
    rate = best["tokens_per_second"]
    return {
        "mode": mode,
        "seq_len": seq_len,
        "compile": compiled,
        "best_batch": best["batch"],
        "tokens_per_second": rate,
        "mfu": None if peak is None else rate * flops / peak,
        "peak_bytes": best["peak_bytes"],
        "max_batch": max(row["batch"] for row in found),
        "batches": found,
    }


def batch_sizes(seq_len: int, most_tokens: int) -> Iterator[int]:
    """Yield batches, each twice the one before; one at least."""
    size = max(1, min(FIRST_TOKENS, most_tokens) // seq_len)
    yield size
    while 2 * size * seq_len <= most_tokens:
        size *= 2
        yield size


def measure_batch(
    device: Device, trainer: Trainer, model: nn.Module, size: int, seq_len: int
) -> dict[str, Any]:
    """Return what steps of a batch take."""
    batch = Batch.of(*random_batch(model.config.vocab_size, size, seq_len, device.torch_device))
    seconds = seconds_of(device, lambda: trainer.step([batch], 1.0))
    return {
        "batch": size,
        "step_seconds": seconds,
        "tokens_per_second": size * seq_len / seconds,
        "peak_bytes": device.peak_bytes(),
    }


def seconds_of(device: Device, work: Callable[[], object]) -> float:
    """Return the median seconds of some work, warmed up."""
    seconds = time_steps(work, WARM_UP_STEPS + NUM_STEPS, lambda: device.sync(wait=True))
    return median(seconds[WARM_UP_STEPS:])


def step_over_plain(device: Device, config: RatesConfig) -> dict[str, float]:
    """Return the seconds of a step over those of plain fine-tuning, compiled and not."""
    tokens, ratios = min(RATIO_TOKENS, config.most_tokens), {}
    for compiled in config.compile:
        seconds = {}
        for case in ("plain", "fake-quant"):
            model = make_model(device, config)
            trainer = make_case(case, model, device.dtype, device.sync)
            compile_decoder_layers(model, compiled)
            size = max(1, tokens // config.lengths[0])
            row = measure_batch(device, trainer, model, size, config.lengths[0])
            seconds[case] = row["step_seconds"]
            del model, trainer
            empty(device)
        ratios[compiled] = seconds["fake-quant"] / seconds["plain"]
    return ratios


@torch.no_grad()
def cache_rate(device: Device, config: RatesConfig) -> dict[str, float]:
    """Return tokens a second of a teacher whose best logits are kept, and of its forward alone."""
    model, seq_len = make_model(device, config), config.lengths[0]
    size = max(1, min(FIRST_TOKENS, config.most_tokens) // seq_len)
    ids, _ = random_batch(model.config.vocab_size, size, seq_len, device.torch_device)

    def forward() -> torch.Tensor:
        return logits_of(model, hidden_states(model, ids))

    bare = seconds_of(device, forward)
    kept = seconds_of(device, lambda: pack_top_k(forward(), TOP_K))
    return {
        "bare_tokens_per_second": size * seq_len / bare,
        "top_k_tokens_per_second": size * seq_len / kept,
    }


def fit_seconds(device: Device, config: RatesConfig) -> float:
    """Return the seconds of a fit of all linears to 2 and 4 bits against inputs of random tokens.

    Of fixed grids: learned codebooks are made by scikit-learn, which may not be there.
    """
    model, seq_len = make_model(device, config), config.lengths[0]
    plan = parse_plan(FIT_PLAN).resolve(surgery.model_tensors(model))
    task = fit_layers.FitTask(
        specs=plan.quantized, weight_of=lambda name: model.get_submodule(name).weight
    )
    count = max(2, min(FIT_TOKENS, config.most_tokens) // seq_len)
    ids, _ = random_batch(model.config.vocab_size, count, seq_len, device.torch_device)
    device.sync(wait=True)
    started = time.perf_counter()
    fit_layers.fit_by_decoder_layers(model, task, ids.split(16), dtype=device.dtype)
    device.sync(wait=True)
    return time.perf_counter() - started


def empty(device: Device) -> None:
    """Give memory back, and begin to count its peak anew."""
    gc.collect()
    device.reset_peak()


def row_text(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    head = f"| L{row['seq_len']} | {row['mode']} | {row['compile']} "
    if row["tokens_per_second"] is None:
        return f"{head}| does not fit | | | | |"
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
    return (
        f"{head}| {row['tokens_per_second']:,.0f} | {mfu} | {row['peak_bytes'] / 1e9:.1f} "
        f"| {row['best_batch']} | {row['max_batch']} |"
    )


def table(values: dict[str, Any]) -> str:
    """Return all numbers as Markdown."""
    ratios = ", ".join(f"{one:.3f} (compile {k})" for k, one in values["step_over_plain"].items())
    cache = values["cache"]
    seeds = ", ".join(f"{rate:,} on {chip}" for chip, rate in SEEDS.items())
    return "\n".join(
        [
            f"{values['shape']} shape, {values['dtype']}, {values['chip']}, torch "
            f"{values['torch']}; the Speedrun Log's L64: {seeds}",
            "",
            "| length | trains | compile | tokens/s | MFU | GB | batch | largest batch |",
            "|---|---|---|---:|---:|---:|---:|---:|",
            *map(row_text, values["rows"]),
            "",
            f"step over plain fine-tuning: {ratios}",
            f"cache: {cache['top_k_tokens_per_second']:,.0f} tokens/s, the bare forward pass "
            f"{cache['bare_tokens_per_second']:,.0f}",
            f"fit of all linears, {FIT_PLAN}, {FIT_TOKENS:,} tokens: {values['fit_seconds']:.1f} s",
        ]
    )
