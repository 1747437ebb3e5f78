"""`qat train`: the story of a run.

Open the student and its cache, choose what trains, take steps, keep the best, write the end.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qat.cli.command import run_command
from qat.tracking.messages import say
from qat.train.config import TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat train", TrainConfig, act, argv)


def act(config: TrainConfig) -> dict[str, Any]:
    """Train, or find the run ended; return the closing values."""
    from qat.model.load import load_tokenizer
    from qat.pipelines.open_checkpoint import BEST_NAME, open_checkpoint
    from qat.pipelines.students import open_cache
    from qat.runtime.device import Device
    from qat.train.run_folder import (
        check_content,
        check_lengths,
        copy_results,
        finished_run,
        run_identity,
    )

    device = Device.detect(config.device)
    say(device.describe())
    opened = open_checkpoint(config.v2_checkpoint, model_id=config.model_id)
    if opened.header is None:
        raise ValueError(f"{opened.path} is no student; `qat init-student` makes one of it")
    header, source = opened.header, opened.text_folder
    tokenizer, teacher = load_tokenizer(source), header.base_model["weights"]
    cache = open_cache(config.cache_dir, tokenizer, None, teacher)
    eval_cache = open_cache(config.eval_cache_dir, tokenizer, None, teacher) or cache
    check_lengths(config, cache.seq_len)
    check_content(config, cache.manifest.identity.content)
    identity = run_identity(config, header.sha256, cache.fingerprint, eval_cache.fingerprint)
    summary = finished_run(config.output_dir, identity)
    if summary is None:
        summary = run(config, device, opened, cache, eval_cache, identity)
    else:
        say(f"{config.output_dir} is this very run, ended: nothing to do")
    if config.gdrive_dir:
        copied = copy_results(config.output_dir, config.gdrive_dir)
        say(f"copied to {config.gdrive_dir}: {', '.join(copied)}")
    return {"checkpoint": str(config.output_dir / BEST_NAME), **summary}


def run(
    config: TrainConfig, device: Any, opened: Any, cache: Any, eval_cache: Any, identity: Any
) -> dict[str, Any]:
    """Start or resume a run and take it to its end."""
    from qat.model.checkpoint import bits_per_weight
    from qat.pipelines.open_checkpoint import FINAL_NAME, latent_or_base_weights, load_model
    from qat.tracking.sinks import open_tracker
    from qat.train.loop import Habits, train_end_to_end
    from qat.train.run_folder import (
        claim_folder,
        make_trainer,
        record_of,
        summary_of,
        training_batches,
    )
    from qat.train.state import Progress, has_state, read_state

    dtype = device.dtype_from_name(config.dtype)
    header, source = opened.header, opened.text_folder
    model, _header = load_model(config.v2_checkpoint, model_id=config.model_id, dtype=dtype)
    device.place(model)
    path = config.model_id or header.base_model["path"]
    weight_of = latent_or_base_weights(opened, {**header.base_model, "path": path})
    claim_folder(config.output_dir, record_of(config, identity))
    seconds = 0.0
    if config.layerwise and not has_state(config.output_dir):
        seconds = layer_by_layer(config, model, header, cache, weight_of, device, dtype)
    trainer = make_trainer(config, model, dtype, weight_of=weight_of, sync=device.sync)
    say(f"training {trainer.num_trained:,} numbers in {len(trainer.layers)} layers, {dtype}")
    progress = Progress(seconds=seconds)
    if has_state(config.output_dir):
        progress = read_state(config.output_dir, model, trainer.optimizer, trainer.ema)
        say(f"going on from step {progress.step}")
    track = open_tracker(
        config.output_dir,
        record_of(config, identity),
        resume_step=progress.step or None,
        wandb=wandb_settings(config),
    )
    made_by = {"command": "train", **identity}
    header = replace(header, cache_fingerprint=cache.fingerprint, made_by=made_by)
    keep = partial(keep_student, config, trainer, header, source)
    progress = train_end_to_end(
        trainer,
        lambda step: training_batches(
            cache,
            config,
            device.torch_device,
            start_step=step,
            vocab_size=model.config.vocab_size,
        ),
        Habits(**{name: getattr(config, name) for name in Habits.__slots__}),
        make_hooks(config, trainer, eval_cache, device, track, keep),
        progress,
    )
    keep(FINAL_NAME, progress.last_eval, progress.step)
    leave_seed_files(config, opened, weight_of)
    summary = summary_of(progress) | bits_per_weight(model)
    track.finish(summary)
    return summary


def layer_by_layer(
    config: TrainConfig,
    model: Any,
    header: Any,
    cache: Any,
    weight_of: Any,
    device: Any,
    dtype: Any,
) -> float:
    """Take the layer-by-layer stage of a run; return its seconds."""
    from qat.model.load import load_dense
    from qat.train.layerwise import layerwise_stage
    from qat.train.run_folder import peak_rates

    teacher = load_dense(config.model_id or header.base_model["path"], dtype=dtype)
    device.place(teacher)
    return layerwise_stage(
        config,
        model,
        teacher,
        cache,
        weight_of=weight_of,
        rates=peak_rates(replace(config, lr=config.layerwise_lr)),
        device=device.torch_device,
        dtype=dtype,
    )


def keep_student(
    config: TrainConfig,
    trainer: Any,
    header: Any,
    source: Path,
    name: str,
    values: dict[str, Any],
    step: int,
) -> None:
    """Write the student as it stands, with its held-out numbers, into the run's folder."""
    from qat.model.checkpoint import write_checkpoint

    header = replace(header, metrics={**values, "step": step})
    with trainer.averaged():
        write_checkpoint(trainer.model, header, config.output_dir / name, text_source=source)


def leave_seed_files(config: TrainConfig, opened: Any, weight_of: Any) -> None:
    """Write the run's students in the seeds' form as well, or say why not."""
    from time import strftime

    from qat.legacy.fp16_snap import snap_student
    from qat.legacy.run_files import BEST_FILE, TIME_FORMAT, why_no_seed_files, write_seed_files
    from qat.pipelines.open_checkpoint import BEST_NAME, FINAL_NAME
    from qat.quant.scheme import Scheme

    scheme = Scheme.from_dict(opened.header.scheme)
    why = why_no_seed_files(scheme, came_in_theirs=opened.path.is_file())
    if why is not None:
        say(f"no {BEST_FILE}: {why}")
        return
    names = write_seed_files(
        config.output_dir,
        best=BEST_NAME,
        last=FINAL_NAME,
        model_id=config.model_id or opened.header.base_model["path"],
        time=strftime(TIME_FORMAT),
        weight_of=weight_of,
        snap=partial(snap_student, bake=True),
    )
    say(f"in the seeds' form: {', '.join(names)}")


def make_hooks(
    config: TrainConfig, trainer: Any, cache: Any, device: Any, track: Any, keep: Any
) -> Any:
    """Return what the loop calls: evaluation, tracking, saving, going back."""
    from qat.evaluate.on_cache import evaluate_on_cache
    from qat.pipelines.open_checkpoint import BEST_NAME
    from qat.train.loop import Hooks
    from qat.train.run_folder import rate_at, rotate
    from qat.train.state import has_state, read_state, write_state

    model, folder = trainer.model, config.output_dir

    def evaluate() -> dict[str, Any]:
        with trainer.averaged():
            return evaluate_on_cache(
                model,
                cache,
                device=device.torch_device,
                dtype=trainer.dtype,
                num_sequences=config.eval_samples,
            )

    def save(progress: Any) -> None:
        write_state(folder, progress, model, trainer.optimizer, trainer.ema)
        if config.keep_checkpoints is not None:
            keep(f"checkpoints/step_{progress.step:07d}", progress.last_eval, progress.step)
            rotate(folder / "checkpoints", config.keep_checkpoints)

    def restore() -> Any:
        if config.on_nan == "stop" or not has_state(folder):
            return None
        return read_state(folder, model, trainer.optimizer, trainer.ema)

    return Hooks(
        rate=partial(rate_at, config),
        hard_weight=lambda step: config.hard_weight(step) if config.has_hard else None,
        evaluate=evaluate,
        track=track,
        keep_best=partial(keep, BEST_NAME),
        save=save,
        restore=restore,
    )


def wandb_settings(config: TrainConfig) -> dict[str, Any] | None:
    """Return where the run goes at Weights & Biases, None where it does not."""
    if not config.wandb:
        return None
    return {
        "project": config.wandb_project,
        "name": config.wandb_run,
        "group": config.wandb_group,
        "tags": config.wandb_tags,
    }
