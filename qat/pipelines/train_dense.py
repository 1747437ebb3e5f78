"""A full-precision model's training on text: the loop, step and records of `train`, another loss.

`pretrain` and `tune` say what is trained and on what. What a run leaves is a model folder, so that
it is a teacher at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.data.token_dataset import PackedBlocks, TokenBlocks
from qat.evaluate.kl import Numbers
from qat.evaluate.on_tokens import evaluate_on_tokens
from qat.export.model_folder import SHARD_SIZE
from qat.model.checkpoint import copy_text_files
from qat.model.factorized import whole_tensors
from qat.model.load import load_dense
from qat.pipelines.open_checkpoint import BEST_NAME, FINAL_NAME
from qat.pipelines.perplexity import Domain, perplexities
from qat.pipelines.place import Place
from qat.pipelines.runs import MeasuredResult, held_folder, open_run_tracker
from qat.runtime import distributed
from qat.runtime.device import dtype_name
from qat.runtime.distributed import from_first
from qat.runtime.launch import is_first
from qat.storage.files import atomic_folder, write_json
from qat.tracking.messages import say
from qat.tracking.record import CONFIG
from qat.tracking.sinks import Tracker
from qat.train import run_folder
from qat.train.copies import RunCopies
from qat.train.dense_config import DenseConfig
from qat.train.float8 import multiply_in_float8, why_no_float8
from qat.train.loop import Hooks, train_end_to_end
from qat.train.pretraining import make_pretrainer
from qat.train.state import Progress, StateWriter, has_state, read_state
from qat.train.step import Batch, Trainer
from qat.train.trainable import check_averages, mode

FLOAT8 = "float8"  # in the identity of runs whose linears multiply so


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseResult:
    """How a run ended."""

    checkpoint: str
    """Folder of the model of the best held-out perplexity, as transformers loads it."""
    parameters: int
    """Tied ones once."""
    best_perplexity: float | None
    """Of held-out documents."""
    best_step: int | None
    final_loss: float | None
    """Nats per token of the last step."""
    steps: int
    tokens_seen: int
    tokens_per_second: float
    seconds: float
    rollbacks: int
    """Times that the run went back to a saved state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseRun:
    """What a run works with, opened and checked, nothing of it made yet."""

    command: str
    config: DenseConfig
    place: Place
    make_model: Callable[[], nn.Module]
    """Gives the float32 model that the run starts from, on the CPU."""
    batches_from: Callable[[torch.device, int], Iterator[Batch]]
    """Gives micro-batches on a device without end, from the first of a step on."""
    heldout: TokenBlocks | PackedBlocks
    domains: list[Domain]
    """Texts that are measured in addition to held-out documents."""
    text_folder: Path
    """Where the tokenizer is that a model's folder gets."""
    identity: dict[str, Any]
    copies: RunCopies


def train_dense(run: DenseRun) -> DenseResult | MeasuredResult:
    """Take a run to its end, or find it already complete.

    Raises:
        ValueError: If settings and folder do not fit each other, the folder is in use, or the loss
            diverged.
    """
    config = run.config
    if config.eval_only:
        return measure(run)
    with held_folder(config, run.identity, run.place.device, run.copies) as summary:
        if summary is None:
            summary = take_run(run)
    return DenseResult(checkpoint=str(config.output_dir / BEST_NAME), **summary)


def run_settings(config: DenseConfig, place: Place) -> dict[str, Any]:
    """Return the part of a run's identity that its settings make; say where float8 is not used.

    Raises:
        ValueError: If the optimizer cannot be had here.
    """
    check_averages(config.optim.averages, place.device.torch_device)
    settings = run_folder.deciding_settings(config, place.device.kind, dtype_name(place.dtype))
    del settings["fp8"]
    why = why_no_float8(place.device.torch_device, place.dtype) if config.fp8 else "--no-fp8"
    if why:
        say(f"no float8: {why}")
    return {"settings": settings} if why else {"settings": settings, FLOAT8: "tensorwise"}


def measure(run: DenseRun) -> MeasuredResult:
    """Measure the run's best model without training."""
    best = run.config.output_dir / BEST_NAME
    with distributed.joined(run.place.device):
        from_first(run.copies.bring)
        if not best.is_dir():
            raise ValueError(
                f"--eval-only: {run.config.output_dir} holds no model yet; train first, or measure "
                "another one by `qat evaluate --perplexity`"
            )
        model = load_dense(best, dtype=run.place.dtype)
        with run.place.device.hosting(model):
            numbers = held_out_numbers(run, model)
    return MeasuredResult(checkpoint=str(best), numbers=numbers)


def held_out_numbers(run: DenseRun, model: nn.Module) -> Numbers:
    """Return a model's perplexity on held-out documents and on the texts, in eval mode."""
    device = run.place.device.torch_device
    numbers = evaluate_on_tokens(
        model,
        run.heldout,
        device=device,
        num_sequences=run.config.intervals.eval_samples,
        is_separate=run.config.documents == "separate",
    )
    return numbers | perplexities(run.domains, model, device, is_shared=True)


def take_run(run: DenseRun) -> dict[str, Any]:
    """Start or resume a run, take it to its end, and return its summary."""
    config, device, folder = run.config, run.place.device, run.config.output_dir
    say(f"compute dtype {dtype_name(run.place.dtype)}")
    record = run_folder.record_of(config, run.identity, command=run.command)
    if is_first():
        write_json(folder / CONFIG, record)  # before anything that the run may resume from
        run.copies.push()  # a place that takes nothing is told before long work
    model = run.make_model()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    device.place(model)
    if FLOAT8 in run.identity:
        say(f"{multiply_in_float8(model)} linears multiply in float8")
    trainer = make_pretrainer(config, model, run.place.dtype, sync=device.sync)
    progress = Progress()
    if from_first(partial(has_state, folder)):
        progress = read_state(folder, trainer)
        say(f"resuming from step {progress.step}")
    track = open_run_tracker(folder, config.tracking, record, progress)
    batches_from = partial(run.batches_from, device.torch_device)
    with StateWriter(folder, **config.intervals.kept_states()) as states:
        hooks = make_hooks(run, trainer, track, states)
        progress = train_end_to_end(trainer, batches_from, config, hooks, progress)
    write_model(run, trainer, FINAL_NAME)
    summary = summary_of(progress, num_parameters)
    track.finish(summary)
    return summary


def make_hooks(run: DenseRun, trainer: Trainer, track: Tracker, states: StateWriter) -> Hooks:
    """Return what the loop calls: evaluation, tracking, saving, going back."""
    config, folder = run.config, run.config.output_dir

    def evaluate() -> dict[str, Any]:
        with trainer.averaged(), trainer.computing(), mode(trainer.model, is_training=False):
            return held_out_numbers(run, trainer.model)

    def save(progress: Progress) -> None:
        if config.intervals.keep_checkpoints is not None:
            write_model(run, trainer, f"checkpoints/step_{progress.step:07d}")
            if is_first():
                run_folder.rotate(folder / "checkpoints", config.intervals.keep_checkpoints)
        states.wait()  # and for its copies, before a snapshot is taken for others
        states.save(progress, trainer, then=run.copies.begin())

    def restore() -> Progress | None:
        states.wait()
        if config.optim.on_nan == "stop" or not from_first(partial(has_state, folder)):
            return None
        return read_state(folder, trainer)

    return Hooks(
        rate=partial(run_folder.rate_at, config),
        hard_weight=lambda _step: None,
        evaluate=evaluate,
        track=track,
        keep_best=lambda _values, _step: write_model(run, trainer, BEST_NAME),
        save=save,
        restore=restore,
    )


def write_model(run: DenseRun, trainer: Trainer, name: str) -> None:
    """Write the model, in float32 and with its tokenizer, into the run's folder."""
    from transformers.utils import logging

    if not is_first():
        return
    logging.disable_progress_bar()
    with trainer.averaged(), atomic_folder(run.config.output_dir / name) as folder:
        model: nn.Module = trainer.model
        tensors = whole_tensors(model)
        model.save_pretrained(folder, state_dict=tensors, max_shard_size=SHARD_SIZE)
        copy_text_files(run.text_folder, folder)


def summary_of(progress: Progress, num_parameters: int) -> dict[str, Any]:
    """Return the closing values of a run."""
    values = run_folder.summary_of(progress)
    of_students = [name for name in asdict(progress) if name.startswith("best_kl_nats")]
    kept = {name: value for name, value in values.items() if name not in of_students}
    return {"parameters": num_parameters, "best_perplexity": progress.best_perplexity, **kept}
