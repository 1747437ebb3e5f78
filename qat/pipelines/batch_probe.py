"""What `qat benchmark` does in a fresh process: describe the device, or measure one batch size."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.benchmark.config import DEFAULT_LENGTH, DEFAULT_MODEL, BenchmarkConfig
from qat.benchmark.throughput import flops_per_token, measure_steps, peak_flops, random_batch
from qat.cache.read import TeacherCache
from qat.evaluate.kl import evaluate_batches
from qat.model.checkpoint import CheckpointHeader
from qat.model.load import load_dense, model_folder, model_identity, vocabulary_size
from qat.model.sharding import gather_in_use, split_parameters, split_rows
from qat.model.surgery import hold_weights, model_tensors
from qat.pipelines.open_cache import open_teacher_cache
from qat.pipelines.open_checkpoint import load_model, open_checkpoint
from qat.pipelines.students import write_student
from qat.quant.plan import parse_plan
from qat.runtime import distributed
from qat.runtime.device import Device, dtype_name
from qat.runtime.launch import num_processes
from qat.runtime.memory import peak_rss_bytes
from qat.storage.files import fingerprint
from qat.tracking.environment import describe_environment
from qat.train.baselines import round_linears
from qat.train.config import TrainConfig
from qat.train.run_folder import check_share, make_trainer, training_batches
from qat.train.state import Progress, write_state
from qat.train.step import Batch

EVAL_SEQUENCES = 16  # of the one evaluation: as many as training measures in a forward pass
PLAN = "q2a4"  # of a student that is made for its shape alone


def describe(config: BenchmarkConfig) -> dict[str, Any]:
    """Return what is measured and where; write the student that was made, where asked."""
    device = Device.detect(config.device)
    dtype = dtype_name(device.dtype_from_name(config.dtype))
    environment = describe_environment(config.device)
    cache, base = sources(config)
    if config.load_model:
        opened = open_checkpoint(config.load_model, model_id=config.model_id)
        if opened.header is None:
            raise ValueError(
                f"--load-model {config.load_model} is no student; give it as --model-id"
            )
        model = {"name": config.load_model, "weights": opened.header.sha256}
        text_folder = opened.text_folder
    else:
        model, text_folder = model_identity(base), model_folder(base)
    if cache is not None:
        cache.require_vocabulary(vocabulary_size(text_folder))
    if config.save_model:
        save_student(config, base, text_folder)
    count = config.processes
    times = f"{count} x " if count > 1 else ""
    rows = " (--shard)" if config.shard else ""
    total, peak = device.total_bytes(), peak_flops(device.chip(), dtype)
    identity = {
        "device": f"{times}{device.torch_device} {device.chip() or environment['machine']}{rows}",
        "model": model,
        "cache": cache and cache.fingerprint,
        "dtype": dtype,
        "seq_len": length(config, cache),
        "mode": config.mode,
        "steps": config.steps,
        "memory_limit": config.memory_limit,
        "versions": {**environment["versions"], "commit": environment["commit"]},
    }
    return {
        "identity": identity,
        "environment": environment,
        "key": fingerprint(identity),
        "total_bytes": total // count if total and device.shares_host_memory else total,
        "compiles_steps": device.compiles_steps,
        "chip": device.chip(),
        "peak_flops": peak and peak * count,
    }


def save_student(config: BenchmarkConfig, base: str, text_folder: Path) -> None:
    """Write the student that is measured, so that it can be loaded again."""
    student = load_student(config, base, torch.float32)
    header = CheckpointHeader(
        plan=parse_plan(PLAN).resolve(model_tensors(student)).to_dict(),
        base_model={"path": base, **model_identity(base)},
        made_by={"command": "benchmark"},
    )
    write_student(student, header, config.save_model, text_source=text_folder)


def probe(config: BenchmarkConfig) -> dict[str, Any]:
    """Measure one batch size in this process; "status" tells whether its memory sufficed.

    Of several processes that share a batch the first to run out ends all, and the caller reads why.
    """
    check_share(config.probe)
    device = Device.detect(config.device)
    if config.limit_bytes is not None:
        device.limit_memory(config.limit_bytes)
    try:
        with distributed.joined(device):
            return {"status": "OK", **most_bytes(measure(config, device))}
    except (RuntimeError, MemoryError) as error:
        if not device.is_out_of_memory(error) or num_processes() > 1:
            raise
        return {"status": "OOM", "why": " ".join(str(error).split())[:400]}


def most_bytes(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the most bytes that any process held."""
    rows = distributed.gathered(row)
    return row | {key: max(one[key] for one in rows) for key in ("step_bytes", "peak_bytes")}


def measure(config: BenchmarkConfig, device: Device) -> dict[str, Any]:
    """Train as `qat train` does for a few steps, evaluate, write a state; return the cost."""
    cache, base = sources(config)
    settings = TrainConfig(
        checkpoint=Path(config.load_model or base),
        cache_dir=config.cache_dir or Path(),
        output_dir=config.output_dir or Path(),
        layers="mlp" if config.mode == "mlp" else "all",
        batch_size=config.probe,
        gradient_checkpointing=config.gradient_checkpointing,
        curriculum=f"{length(config, cache)}:0",
        shard=config.shard,
    )
    dtype = device.dtype_from_name(config.dtype)
    model = load_student(config, base, dtype)
    if config.shard:
        split_rows(model)
    device.place(model)
    trainer = make_trainer(settings, model, dtype, weight_of=lambda _layer: None, sync=device.sync)
    if config.shard:
        gather_in_use(model, dtype)
        trainer.split = split_parameters(model)
    batches = batches_of(settings, cache, model.config.vocab_size, device.torch_device)

    def evaluate_and_save() -> None:
        sizes = replace(settings, batch_size=min(EVAL_SEQUENCES, config.probe))
        held_out = next(batches_of(sizes, cache, model.config.vocab_size, device.torch_device))
        hold_weights(model, dtype)
        pairs = [(held_out.token_ids, held_out.unpack())]
        evaluate_batches(model, pairs, description="evaluate")
        with tempfile.TemporaryDirectory() as folder:
            write_state(Path(distributed.from_first(lambda: folder)), Progress(), trainer)

    return measure_steps(
        lambda: trainer.step([next(batches)], 1.0)[0],
        config.steps,
        partial(device.sync, wait=True),
        lambda: device.peak_bytes() or peak_rss_bytes(),
        evaluate_and_save,
    ) | {"flops_per_token": flops_per_token(model, trainer.layers)}


def load_student(config: BenchmarkConfig, base: str, dtype: torch.dtype) -> nn.Module:
    """Return the student that is measured, on the CPU."""
    if config.load_model:
        return load_model(config.load_model, model_id=config.model_id, dtype=dtype)[0]
    model = load_dense(base, dtype=dtype)
    round_linears(model, parse_plan(PLAN).resolve(model_tensors(model)))
    return model


def sources(config: BenchmarkConfig) -> tuple[TeacherCache | None, str]:
    """Return the cache, if there is one, and the full-precision model's name or folder."""
    if config.cache_dir is None:
        return None, config.model_id or DEFAULT_MODEL
    cache = open_teacher_cache(config.cache_dir)
    named = cache.manifest.teacher_name or DEFAULT_MODEL
    local = Path(DEFAULT_MODEL).parent / named
    return cache, config.model_id or (str(local) if local.is_dir() else named)


def length(config: BenchmarkConfig, cache: TeacherCache | None) -> int:
    """Return the tokens of a sequence."""
    longest = cache.seq_len if cache else None
    if longest and (config.seq_len or 0) > longest:
        raise ValueError(
            f"--seq-len {config.seq_len} is longer than the cache's blocks of {longest}; "
            "leave it out, or build a longer cache"
        )
    return config.seq_len or longest or DEFAULT_LENGTH


def batches_of(
    settings: TrainConfig, cache: TeacherCache | None, vocab_size: int, torch_device: torch.device
) -> Iterator[Batch]:
    """Return endless batches as training reads them, or one of random tokens again and again."""
    if cache is not None:
        return training_batches(cache, settings, torch_device, start_step=0)
    _first, seq_len = settings.lengths()[0]
    token_ids, signal = random_batch(
        vocab_size, len(distributed.share(range(settings.batch_size))), seq_len, torch_device
    )
    batch = Batch.of(token_ids, signal)
    return repeat(replace(batch, num_sequences=settings.batch_size))
