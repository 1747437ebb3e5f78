"""`qat train`: the story of a run.

Open the student and the cache, choose what trains, take steps, keep the best, write the end.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qat.commands.door import run_command, say
from qat.train.config import TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat train", TrainConfig, act, argv)


def act(config: TrainConfig) -> dict[str, Any]:
    """Train, and return the closing values."""
    from qat.commands.students import open_cache
    from qat.device import Device
    from qat.model.checkpoint import read_header
    from qat.model.load import BEST_NAME, checkpoint_folder, load_tokenizer
    from qat.train.run import finished_run, run_identity

    device = Device.detect(config.device)
    say(device.describe())
    source = checkpoint_folder(config.v2_checkpoint)
    header = read_header(source)
    cache = open_cache(config.cache_dir, load_tokenizer(source), None, header.base_model["weights"])
    identity = run_identity(config, header.sha256, cache.fingerprint)
    summary = finished_run(config.output_dir, identity)
    if summary is None:
        summary = run(config, device, source, header, cache, identity)
    else:
        say(f"{config.output_dir} is this very run, ended: nothing to do")
    return {"checkpoint": str(config.output_dir / BEST_NAME), **summary}


def run(
    config: TrainConfig, device: Any, source: Path, header: Any, cache: Any, identity: Any
) -> dict[str, Any]:
    """Start or resume a run and take it to its end."""
    from qat.evaluate.on_cache import evaluate_on_cache
    from qat.model.checkpoint import write_checkpoint
    from qat.model.load import BEST_NAME, FINAL_NAME, load_model
    from qat.tracking.record import RunRecord
    from qat.tracking.sinks import LocalSink, Tracker, WandbSink
    from qat.train.end_to_end import Habits, Hooks, train_end_to_end
    from qat.train.run import record_of, training_batches
    from qat.train.schedule import rate_factor
    from qat.train.state import has_state, read_state, write_state

    dtype = device.dtype_from_name(config.dtype)
    model, _header = load_model(source, dtype=dtype)
    trainer = make_trainer(config, device, dtype, model, header)
    progress = None
    if has_state(config.output_dir):
        progress = read_state(config.output_dir, model, trainer.optimizer)
        say(f"going on from step {progress.step}")
    model.to(device.torch_device)

    record = RunRecord(config.output_dir, resume_step=progress and progress.step)
    record.write_config(record_of(config, identity))
    sinks: list[Any] = [LocalSink(record)]
    if config.wandb:
        sinks.append(
            WandbSink(
                config.output_dir,
                record_of(config, identity),
                project=config.wandb_project,
                name=config.wandb_run,
                resume=progress is not None,
            )
        )
    track = Tracker(sinks)
    made_by = {"command": "train", **identity}
    trained = replace(header, cache_fingerprint=cache.fingerprint, made_by=made_by)

    def keep(name: str, values: dict[str, Any], step: int) -> None:
        metrics = {**values, "step": step}
        folder = config.output_dir / name
        write_checkpoint(model, replace(trained, metrics=metrics), folder, text_source=source)

    progress = train_end_to_end(
        trainer,
        training_batches(
            cache, config, device.torch_device, start_step=progress.step if progress else 0
        ),
        Habits(**{name: getattr(config, name) for name in Habits.__slots__}),
        Hooks(
            rate=partial(
                rate_factor,
                max_steps=config.max_steps,
                warmup_steps=config.warmup_steps,
                min_ratio=config.min_lr_ratio,
                is_constant=config.constant_lr,
            ),
            evaluate=partial(
                evaluate_on_cache,
                model,
                cache,
                device=device.torch_device,
                dtype=dtype,
                num_sequences=config.eval_samples,
            ),
            track=track,
            keep_best=partial(keep, BEST_NAME),
            save=lambda progress: write_state(
                config.output_dir, progress, model, trainer.optimizer
            ),
        ),
        progress,
    )
    keep(FINAL_NAME, progress.last_eval, progress.step)
    summary = {
        "steps": progress.step,
        "best_kl_nats": progress.best_kl_nats,
        "best_step": progress.best_step,
        "final_loss": progress.last_loss,
        "tokens_seen": progress.tokens_seen,
        "tokens_per_second": progress.tokens_seen / max(progress.seconds, 1e-9),
        "seconds": progress.seconds,
    }
    track.finish(summary)
    return summary


def make_trainer(config: TrainConfig, device: Any, dtype: Any, model: Any, header: Any) -> Any:
    """Choose what trains and return what a step works with."""
    from qat.distill.kl import forward_kl
    from qat.model.load import base_weights
    from qat.model.surgery import hold_weights
    from qat.train.run import peak_rates
    from qat.train.step import Trainer
    from qat.train.trainable import (
        choose_trainable,
        count_parameters,
        make_optimizer,
        set_training_mode,
        trained_layers,
    )

    weight_of = base_weights(config.model_id or header.base_model["path"], header.base_model)
    chosen = choose_trainable(
        model, kinds=config.kinds, parts=config.trainable, weight_of=weight_of
    )
    hold_weights(model, dtype)
    set_training_mode(model, gradient_checkpointing=config.gradient_checkpointing)
    layers = trained_layers(model)
    counts = ", ".join(f"{count:,} {part}" for part, count in count_parameters(chosen).items())
    say(f"training {counts} in {len(layers)} layers; compute {dtype}")
    return Trainer(
        model=model,
        layers=layers,
        optimizer=make_optimizer(chosen, peak_rates(config), config.weight_decay),
        divergence=forward_kl,
        dtype=dtype,
        clip_grad_norm=config.clip_grad_norm,
        sync=device.sync,
    )
