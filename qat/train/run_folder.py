"""A run as a folder: what decides it, whether it is finished, what it leaves behind."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.cache.read import CacheBatch, TeacherCache, shuffled_batches
from qat.distill.candidates import draw_negatives, with_negatives
from qat.distill.objective import TEXT_LOSS, make_divergence
from qat.distill.teacher import TeacherSignal, text_signal
from qat.grids.scales import TensorScale
from qat.model.sharding import spread_rows
from qat.model.surgery import has_low_rank_scales, hold_outer_weights, hold_weights
from qat.quant.spec import TensorSpec
from qat.runtime import distributed
from qat.runtime.device import is_traced, num_chips
from qat.runtime.launch import num_processes
from qat.tracking.record import SETTINGS, config_as_json, flat_settings, read_config, read_summary
from qat.train import trainable
from qat.train.config import OptimConfig, TrainConfig
from qat.train.dense_config import DenseConfig
from qat.train.ema import MovingAverage
from qat.train.schedule import rate_factor
from qat.train.state import Progress
from qat.train.step import Batch, Trainer, loss_scaler

COMMAND = "train"
# Settings that do not decide a run's numbers; what lies at a path is in the identity by its hash.
PLACES = (
    *("checkpoint", "cache_dir", "eval_cache_dir", "output_dir", "model", "shard", "tracking."),
    *("data", "arch", "eval_sets", "eval_only", "compile", "form_weights"),
    *("intervals.log_steps", "intervals.save_steps", "intervals.keep_"),
)
FOREIGN_FILES = ("config.json", "checkpoint.json", "*.pt", "*.safetensors")


def run_identity(
    config: TrainConfig,
    checkpoint: str,
    cache: str,
    eval_cache: str | None = None,
    *,
    device_kind: str,
    dtype: str,
) -> dict[str, Any]:
    """Return what decides a run's numbers: its settings, the student, the caches it reads."""
    settings = deciding_settings(config, device_kind, dtype)
    caches = {"cache": cache}
    if eval_cache not in (None, cache):
        caches["eval_cache"] = eval_cache
    return {"settings": settings, "checkpoint": checkpoint, **caches}


def deciding_settings(
    config: TrainConfig | DenseConfig, device_kind: str, dtype: str
) -> dict[str, Any]:
    """Return the settings that decide a run's numbers, by the names of flags."""
    settings = without_places(flat_settings(config_as_json(config)))
    return settings | {"device": device_kind, "dtype": dtype}


def without_places(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings but those that do not decide a run's numbers."""
    return {name: value for name, value in settings.items() if not name.startswith(PLACES)}


def record_of(
    config: TrainConfig | DenseConfig,
    identity: dict[str, Any],
    latent_start: str | None = None,
    *,
    command: str = COMMAND,
) -> dict[str, Any]:
    """Return config.json of a run: the command, its whole config, and the identity."""
    record = {"command": command, SETTINGS: config_as_json(config), "identity": identity}
    return record if latent_start is None else {**record, "latent_start": latent_start}


def finished_run(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return the summary of the run with this identity if it has ended; None if it has not.

    Raises:
        ValueError: If the folder holds a run of other settings, whose first difference is named,
            or something else than a run.
    """
    previous = read_config(folder).get("identity")
    foreign = [path.name for pattern in FOREIGN_FILES for path in folder.glob(pattern)]
    if previous is None and foreign:
        raise ValueError(
            f"{folder} holds {foreign[0]}, which is not of a training run: a model or a student is "
            "there; choose another --output-dir"
        )
    if previous is None:
        return None
    decided = {**previous, "settings": without_places(previous.get("settings", {}))}
    name, old, new = first_difference(decided, identity)
    if name is not None:  # what an older run does not name, it left at None
        raise ValueError(
            f"{folder} holds a run with {name} {old}, this one has {new}; "
            "choose another --output-dir or remove that folder"
        )
    return read_summary(folder) or None


def first_difference(
    previous: dict[str, Any], expected: dict[str, Any]
) -> tuple[str | None, Any, Any]:
    """Return name and both values of the first field, or field of a field, that differs."""
    flat: list[dict[str, Any]] = [{}, {}]
    for values, fields in zip(flat, (previous, expected), strict=True):
        for name, value in fields.items():
            values.update(value if isinstance(value, dict) else {name: value})
    names = sorted(flat[0] | flat[1])
    name = next((name for name in names if flat[0].get(name) != flat[1].get(name)), None)
    return name, flat[0].get(name), flat[1].get(name)


def training_batches(
    cache: TeacherCache,
    config: TrainConfig,
    device: torch.device,
    start_step: int,
    *,
    vocab_size: int | None = None,
) -> Iterator[Batch]:
    """Yield micro-batches on the device without end, from the first of a step on.

    Of several processes each gets its share of the sequences of every micro-batch.
    """
    start = start_step * config.accumulation_steps
    batches = shuffled_batches(
        cache,
        batch_size=config.batch_size,
        seed=config.seed,
        start_batch=start,
        share=distributed.share,
    )
    stages, num_negatives = config.lengths(), config.loss.sampled_negatives
    for number, whole in enumerate(batches, start=start):
        length = length_at(stages, number // config.accumulation_steps)
        packed = cropped(whole.to(device, non_blocking=True), length)
        drawn = None
        if num_negatives:
            drawn = draw_negatives(config.seed, number, vocab_size, num_negatives)
        yield Batch(
            token_ids=packed.input_ids,
            mask=packed.mask,
            document_ids=packed.document_ids,
            num_sequences=config.batch_size,
            unpack=partial(text_signal, packed.input_ids, packed.mask)
            if config.loss.divergence == TEXT_LOSS
            else partial(unpacked, packed, drawn),
        )


def cropped(packed: CacheBatch, length: int | None) -> CacheBatch:
    """Return a batch cut to a length; None = as it is."""
    if length is None:
        return packed
    return replace(
        packed,
        input_ids=packed.input_ids[:, :length],
        document_ids=None if packed.document_ids is None else packed.document_ids[:, :length],
        mask=packed.mask[:, : length - 1],
        fields={name: field[:, : length - 1] for name, field in packed.fields.items()},
    )


def unpacked(packed: CacheBatch, negative_ids: Tensor | None) -> TeacherSignal:
    """Return a batch's signal, which asks for negatives where there are any."""
    signal = replace(packed).signal  # of a copy: a batch keeps its own
    return signal if negative_ids is None else with_negatives(signal, negative_ids)


def length_at(stages: list[tuple[int, int]], step: int) -> int | None:
    """Return the length of sequences that the curriculum has at a step; None without one."""
    lengths = [length for first, length in stages if first <= step]
    return lengths[-1] if lengths else None


def check_lengths(config: TrainConfig, seq_len: int) -> None:
    """Refuse a curriculum longer than the cache's blocks."""
    longest = max((length for _, length in config.lengths()), default=0)
    if longest > seq_len:
        raise ValueError(
            f"--curriculum reaches length {longest}, the cache has blocks of {seq_len}; "
            f"build a cache with --seq-len {longest}"
        )


def check_processes(config: TrainConfig, device: torch.device) -> None:
    """Refuse more processes than a micro-batch has sequences, and what one process must do."""
    check_share(config.batch_size)
    if num_processes() == 1:
        return
    if config.layerwise.sequences:
        raise ValueError(
            f"--layerwise.sequences {config.layerwise.sequences}: one process trains layer by "
            "layer; train so first without torchrun, then its final student with it"
        )
    if config.shard and is_traced(device):
        raise ValueError(
            "--shard with --device xla: the chips of a host hold rows of every weight without it; "
            "leave it out"
        )
    if config.shard and config.dtype == "fp16":
        raise ValueError("--shard with --dtype fp16: loss scales are of one process; use bf16")
    if config.shard and config.optim.averages == "8bit":
        raise ValueError("--shard with --optim.averages 8bit: a scale is of several rows; use one")
    if config.shard and config.form_weights == "in-use":
        raise ValueError("--shard with --form-weights in-use: it gathers them in use; use one")


def check_share(batch_size: int) -> None:
    """Refuse a micro-batch of fewer sequences than processes, some of which would get none."""
    if batch_size < (count := num_processes()):
        raise ValueError(
            f"--batch-size {batch_size} is shared by {count} processes; give {count} or more"
        )


def is_split(config: TrainConfig) -> bool:
    """Return whether processes hold some rows of each weight."""
    return config.shard and num_processes() > 1


def splittable(specs: Iterable[TensorSpec]) -> bool:
    """Return whether weights in these formats can be split by rows."""
    return not any(isinstance(spec.scale, TensorScale) for spec in specs)


def check_content(config: TrainConfig, content: str) -> None:
    """Refuse candidates where the cache names none."""
    if config.loss.sampled_negatives and content == "hidden":
        raise ValueError(
            f"--loss.sampled-negatives {config.loss.sampled_negatives} needs a cache of token ids, "
            "this one is hidden: every logit follows from it; leave out the flag, or build a cache "
            "with --content top-k or sampled"
        )


def make_trainer(
    config: TrainConfig,
    model: nn.Module,
    dtype: torch.dtype,
    *,
    weight_of: Callable[[str], Tensor | None],
    sync: Callable[[], None],
) -> Trainer:
    """Choose what trains and return what a step works with."""
    optim, parts = config.optim, config.parts(is_low_rank=has_low_rank_scales(model))
    if not config.max_steps:
        parts = ("norms",)  # nothing moves, and nothing takes latent weights
    chosen = trainable.choose_trainable(
        model,
        kinds=config.kinds,
        parts=parts,
        weight_of=weight_of,
        formats=config.formats,
    )
    in_use = config.form_weights == "in-use" or not config.max_steps
    if in_use:
        hold_outer_weights(model, dtype)
    else:
        hold_weights(model, dtype)
    if config.gradient_checkpointing:
        trainable.enable_gradient_checkpointing(model)
    trainable.compile_decoder_layers(model, config.compile)
    if num_chips(next(model.parameters()).device) > 1:
        spread_rows(model)
    parameters = [parameter for part in chosen.values() for parameter in part]
    return Trainer(
        model=model,
        layers=trainable.trained_layers(model),
        optimizer=trainable.make_optimizer(
            chosen,
            peak_rates(optim, optim.lr),
            weight_decay=optim.weight_decay,
            units=trainable.rate_units(model) if optim.relative else None,
            averages=optim.averages,
        ),
        divergence=make_divergence(
            config.loss.divergence, temperature=config.loss.used_temperature
        ),
        dtype=dtype,
        clip_grad_norm=optim.clip_grad_norm,
        sync=sync,
        ema=MovingAverage(parameters, optim.ema_decay) if optim.ema_decay else None,
        forms_in_use=in_use,
        scaler=loss_scaler(parameters[0].device, dtype),
    )


def peak_rates(optim: OptimConfig, lr: float) -> dict[str, float]:
    """Return the peak learning rate of each part, where that of latent weights is `lr`."""
    scales = ("scales", "directions", "magnitudes")
    return {
        "weights": lr,
        **dict.fromkeys(scales, lr * optim.scale_lr_ratio),
        "codebooks": lr * optim.codebook_lr_ratio,
        "norms": lr * optim.norm_lr_ratio,
    }


def rate_at(config: TrainConfig | DenseConfig, progress: Progress) -> float:
    """Return the share of the peak rates at the next step; every rollback has halved it."""
    factor = rate_factor(
        progress.step,
        max_steps=config.max_steps,
        warmup_steps=config.optim.warmup_of(config.max_steps),
        min_ratio=config.optim.min_lr_ratio,
        schedule=config.optim.schedule,
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
        "best_kl_nats_lower": progress.best_kl_nats_lower,
        "best_step": progress.best_step,
        "final_loss": progress.last_loss,
        "steps": progress.step,
        "tokens_seen": progress.tokens_seen,
        "tokens_per_second": progress.tokens_seen / max(progress.seconds, 1e-9),
        "seconds": progress.seconds,
        "rollbacks": progress.rollbacks,
    }
