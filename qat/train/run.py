"""A run as a folder: what decides it, whether it is finished, what it leaves behind."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qat.cache.read import TeacherCache, shuffled_batches
from qat.files import canonical_json
from qat.tracking.record import read_config, read_summary
from qat.train.config import TrainConfig
from qat.train.step import Batch

PLACES = (
    "output_dir",
    "device",
    "wandb",
    "wandb_project",
    "wandb_run",
    "model_id",
    "v2_checkpoint",
    "cache_dir",
    "save_steps",
)


def run_identity(config: TrainConfig, checkpoint: str, cache: str) -> dict[str, Any]:
    """Return what decides a run's numbers: its settings, the student and the cache it reads."""
    settings = {k: v for k, v in asdict(config).items() if k not in PLACES}
    return {"settings": settings, "checkpoint": checkpoint, "cache": cache}


def record_of(config: TrainConfig, identity: dict[str, Any]) -> dict[str, Any]:
    """Return config.json of a run: every flag as given, and the identity."""
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    return {**flags, "identity": identity}


def finished_run(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return the summary of this very run if it has ended; None if it is to start or go on.

    Raises:
        ValueError: If the folder holds a run of other settings; names the first that differs.
    """
    former = read_config(folder).get("identity")
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
    cache: TeacherCache, config: TrainConfig, device: torch.device, *, start_step: int
) -> Iterator[Batch]:
    """Yield micro-batches on the device without end, from the first of a step on."""
    batches = shuffled_batches(
        cache,
        batch_size=config.batch_size,
        seed=config.seed,
        start_batch=start_step * config.accumulation_steps,
    )
    for batch in batches:
        moved = batch.to(device, non_blocking=True)
        yield moved.input_ids, moved.signal


def peak_rates(config: TrainConfig) -> dict[str, float]:
    """Return the peak learning rate of each part."""
    return {
        "weights": config.lr,
        "scales": config.lr * config.scale_lr_ratio,
        "magnitudes": config.lr * config.scale_lr_ratio,
        "codebooks": config.lr * config.codebook_lr_ratio,
        "norms": config.lr * config.norm_lr_ratio,
    }
