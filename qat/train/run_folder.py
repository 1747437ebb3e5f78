"""A run as a folder: what decides it, whether it is finished, what it leaves behind."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.cache.read import CacheBatch, TeacherCache, shuffled_batches
from qat.distill.candidates import draw_negatives, with_negatives
from qat.distill.objective import make_divergence
from qat.model.surgery import has_low_rank_scales, hold_weights
from qat.storage.files import canonical_json, write_json
from qat.tracking.record import CONFIG, read_config, read_summary
from qat.train.config import TrainConfig
from qat.train.ema import MovingAverage
from qat.train.schedule import rate_factor
from qat.train.state import STATE, Progress
from qat.train.step import Batch, Trainer
from qat.train.trainable import (
    choose_trainable,
    freeze_magnitudes,
    make_optimizer,
    set_training_mode,
    trained_layers,
)

PLACES = {
    "output_dir",
    "device",
    "model_id",
    "v2_checkpoint",
    "cache_dir",
    "eval_cache_dir",
    "save_steps",
    "keep_checkpoints",
    "gdrive_dir",
    "log_steps",
}


def run_identity(
    config: TrainConfig, checkpoint: str, cache: str, eval_cache: str | None = None
) -> dict[str, Any]:
    """Return what decides a run's numbers: its settings, the student, the caches it reads."""
    flags = asdict(config)
    settings = {k: v for k, v in flags.items() if k not in PLACES and not k.startswith("wandb")}
    caches = {"cache": cache}
    if eval_cache not in (None, cache):
        caches["eval_cache"] = eval_cache
    return {"settings": settings, "checkpoint": checkpoint, **caches}


def record_of(config: TrainConfig, identity: dict[str, Any]) -> dict[str, Any]:
    """Return config.json of a run: every flag as given, and the identity."""
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    return {**flags, "identity": identity}


def finished_run(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return the summary of this very run if it has ended; None if it is to start or go on.

    Raises:
        ValueError: If the folder holds a run of other settings, whose first difference is named,
            or something else than a run.
    """
    former = read_config(folder).get("identity")
    if former is None and (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} holds a config.json that is no run's: a model or a student lies there; "
            "choose another --output-dir"
        )
    if former is None:
        return None
    plain = as_json(identity)
    if former != plain:
        name, old, new = first_difference(former, plain)
        raise ValueError(
            f"{folder} holds a run with {name} {old}, this one has {new}; "
            "choose another --output-dir or remove that folder"
        )
    return read_summary(folder) or None


def claim_folder(folder: Path, record: dict[str, Any]) -> None:
    """Say what a run's folder is for before anything is kept there that it may go on from."""
    write_json(folder / CONFIG, record)


def as_json(value: Any) -> Any:
    """Return a value as JSON gives it back: tuples as lists."""
    return json.loads(canonical_json(value))


def first_difference(former: dict[str, Any], wanted: dict[str, Any]) -> tuple[str, Any, Any]:
    """Return the name and both values of the first field that differs."""
    flat = [
        {**d.get("settings", {}), **{k: v for k, v in d.items() if k != "settings"}}
        for d in (former, wanted)
    ]
    name = next(k for k in sorted(flat[0] | flat[1]) if flat[0].get(k) != flat[1].get(k))
    return name, flat[0].get(name), flat[1].get(name)


def training_batches(
    cache: TeacherCache,
    config: TrainConfig,
    device: torch.device,
    *,
    start_step: int,
    vocab_size: int | None = None,
) -> Iterator[Batch]:
    """Yield micro-batches on the device without end, from the first of a step on.

    Args:
        cache: Where they are.
        config: The run's.
        device: Where they go.
        start_step: The first step to give.
        vocab_size: Width of the student's logits; read where negatives are drawn from it.
    """
    start = start_step * config.accumulation_steps
    batches = shuffled_batches(
        cache, batch_size=config.batch_size, seed=config.seed, start_batch=start
    )
    stages = config.lengths()
    for number, batch in enumerate(batches, start=start):
        moved = batch.to(device, non_blocking=True)
        token_ids, signal = cropped(moved, stages, number // config.accumulation_steps)
        if not config.full_logits:
            drawn = draw_negatives(config.seed, number, vocab_size, config.sampled_negatives)
            signal = with_negatives(signal, drawn)
        yield token_ids, signal


def cropped(batch: CacheBatch, stages: list[tuple[int, int]], step: int) -> Batch:
    """Return a batch cut to the length that the curriculum has at a step."""
    lengths = [length for first, length in stages if first <= step]
    if not lengths or lengths[-1] >= batch.input_ids.shape[1]:
        return batch.input_ids, batch.signal
    length = lengths[-1]
    return batch.input_ids[:, :length], batch.signal.map(lambda tensor: tensor[:, : length - 1])


def check_lengths(config: TrainConfig, seq_len: int) -> None:
    """Refuse a curriculum longer than the cache's blocks."""
    longest = max((length for _, length in config.lengths()), default=0)
    if longest > seq_len:
        raise ValueError(
            f"--curriculum reaches length {longest}, the cache has blocks of {seq_len}; "
            f"build a cache with --seq-len {longest}"
        )


def check_content(config: TrainConfig, content: str) -> None:
    """Refuse candidates where the cache names none."""
    if not config.full_logits and content == "hidden":
        raise ValueError(
            "--no-full-logits needs a cache of token ids, this one is hidden: every logit follows "
            "from it; leave out the flag, or build a cache with --content top-k or sampled"
        )


def make_trainer(
    config: TrainConfig,
    model: nn.Module,
    dtype: torch.dtype,
    *,
    weight_of: Callable[[str], Tensor | None],
    sync: Callable[[], None],
) -> Trainer:
    """Choose what trains and return what a step works with.

    Args:
        config: The run's.
        model: A student on its device.
        dtype: Compute dtype.
        weight_of: Full-precision weight of a layer by name, None where unknown.
        sync: Called once a step.
    """
    chosen = choose_trainable(
        model,
        kinds=config.kinds,
        parts=config.parts(is_low_rank=has_low_rank_scales(model)),
        weight_of=weight_of,
    )
    if config.freeze_mags:
        freeze_magnitudes(model, chosen)
    hold_weights(model, dtype)
    set_training_mode(model, gradient_checkpointing=config.gradient_checkpointing)
    parameters = [parameter for part in chosen.values() for parameter in part]
    return Trainer(
        model=model,
        layers=trained_layers(model),
        optimizer=make_optimizer(chosen, peak_rates(config), config.weight_decay),
        divergence=make_divergence(config.loss, temperature=config.loss_temperature),
        dtype=dtype,
        clip_grad_norm=config.clip_grad_norm,
        sync=sync,
        ema=MovingAverage(parameters, config.ema_decay) if config.ema_decay else None,
    )


def peak_rates(config: TrainConfig) -> dict[str, float]:
    """Return the peak learning rate of each part."""
    return {
        "weights": config.lr,
        "scales": config.lr * config.scale_lr_ratio,
        "magnitudes": config.lr * config.scale_lr_ratio,
        "codebooks": config.lr * config.codebook_lr_ratio,
        "norms": config.lr * config.norm_lr_ratio,
    }


def rate_at(config: TrainConfig, progress: Progress) -> float:
    """Return the share of the peak rates at the next step; every rollback has halved it."""
    factor = rate_factor(
        progress.step,
        max_steps=config.max_steps,
        warmup_steps=config.warmup_steps,
        min_ratio=config.min_lr_ratio,
        schedule="constant" if config.constant_lr else config.schedule,
    )
    return factor * 0.5**progress.rollbacks


def rotate(folder: Path, keep: int) -> None:
    """Remove the oldest students of a folder but the last `keep`; 0 keeps all."""
    students = sorted(path for path in folder.glob("step_*") if path.is_dir())
    for path in students[:-keep] if keep else []:
        shutil.rmtree(path)


def summary_of(progress: Progress) -> dict[str, Any]:
    """Return the closing values of a run."""
    return {
        "best_kl_nats": progress.best_kl_nats,
        "best_step": progress.best_step,
        "final_loss": progress.last_loss,
        "steps": progress.step,
        "tokens_seen": progress.tokens_seen,
        "tokens_per_second": progress.tokens_seen / max(progress.seconds, 1e-9),
        "seconds": progress.seconds,
        "rollbacks": progress.rollbacks,
    }


def copy_results(run: Path, target: Path) -> list[str]:
    """Copy what a run leaves, but for the state to resume from; return the names copied."""
    target.mkdir(parents=True, exist_ok=True)
    copied = []
    for path in sorted(run.iterdir()):
        if path.name == STATE or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copy2(path, target / path.name)
        copied.append(path.name)
    return copied
