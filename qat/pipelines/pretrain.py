"""A model from a shape and token shards: the loop, step and records of `train`, another loss.

What it leaves is a model folder, so that it is a teacher at once.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from qat.data.text import tokenizer_sha256, vocabulary_size
from qat.data.token_dataset import TokenBlocks, TokenDataset
from qat.data.token_shards import REMEDY, DamagedShards
from qat.evaluate.on_tokens import evaluate_on_tokens
from qat.export.model_folder import SHARD_SIZE
from qat.model.architectures import count_parameters, new_model, read_architecture
from qat.model.checkpoint import copy_text_files
from qat.model.load import load_tokenizer
from qat.pipelines.open_checkpoint import BEST_NAME, FINAL_NAME
from qat.pipelines.perplexity import Domain, read_domains
from qat.pipelines.place import Place
from qat.runtime.device import dtype_name, seeded
from qat.storage.files import (
    atomic_folder,
    fingerprint,
    folder_lock,
    sweep_leftovers,
    write_json,
)
from qat.tracking.messages import say
from qat.tracking.record import CONFIG
from qat.tracking.sinks import Tracker, open_tracker
from qat.train import run_folder
from qat.train.copies import RunCopies
from qat.train.loop import Hooks, train_end_to_end
from qat.train.pretrain_config import PretrainConfig
from qat.train.pretraining import make_pretrainer, token_batches
from qat.train.state import Progress, StateWriter, has_state, read_state
from qat.train.step import Trainer
from qat.train.trainable import mode

COMMAND = "pretrain"


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainResult:
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
class Run:
    """What a run works with, opened and checked, nothing of it made yet."""

    config: PretrainConfig
    place: Place
    tokens: TokenDataset
    heldout: TokenBlocks
    domains: list[Domain]
    """Texts that are measured in addition to held-out documents."""
    shape: PreTrainedConfig
    identity: dict[str, Any]
    copies: RunCopies


def pretrain(config: PretrainConfig) -> PretrainResult:
    """Train a new model on token shards, or find the run already complete.

    Raises:
        ValueError: If shards, shape, settings and folder do not fit each other, the folder is in
            use, or the loss diverged.
        FileNotFoundError: If there are no such shards.
    """
    run = open_run(config)
    config, copies, folder = run.config, run.copies, run.copies.folder
    run_folder.finished_run(folder, run.identity)  # refuse before the folder is touched
    with folder_lock(folder), seeded(run.place.device.torch_device, config.seed):
        copies.bring()
        sweep_leftovers(folder)
        summary = run_folder.finished_run(folder, run.identity)
        if summary is None:
            summary = take_run(run)
        else:
            say(f"{folder} is already complete: nothing to do")
        copies.push()
        if copies.places:
            say(f"copied to {copies.places}")
    return PretrainResult(checkpoint=str(folder / BEST_NAME), **summary)


def open_run(config: PretrainConfig) -> Run:
    """Look up shards, shape, device and dtype; refuse what does not fit."""
    place, tokens = Place.of(config), TokenDataset.open(config.data_dir)
    shape = shape_for(config, tokens)
    for stage in config.stages():  # refuses shards that hold no block of a stage
        TokenBlocks(tokens, "train", stage.seq_len)
    length = config.longest
    domains = read_domains(
        config.eval_sets,
        load_tokenizer(tokens.tokenizer_folder),
        window=length,
        stride=max(1, length // 2),
    )
    identity = {
        "settings": run_folder.deciding_settings(
            config, place.device.kind, dtype_name(place.dtype)
        ),
        "model": fingerprint(shape_values(shape)),
        "tokens": tokens.fingerprint,
    }
    copies = RunCopies(config.output_dir, config.tracking.copy_to)
    return Run(
        config=replace(config, output_dir=copies.folder),
        place=place,
        tokens=tokens,
        heldout=TokenBlocks(tokens, "heldout", length),
        domains=domains,
        shape=shape,
        identity=identity,
        copies=copies,
    )


def shape_values(shape: PreTrainedConfig) -> dict[str, Any]:
    """Return a config as JSON, the same by any version of transformers that writes it."""
    values = json.loads(shape.to_json_string())
    return {name: value for name, value in values.items() if name != "transformers_version"}


def shape_for(config: PretrainConfig, tokens: TokenDataset) -> PreTrainedConfig:
    """Return the model's config, with the special tokens of the shards' tokenizer.

    Raises:
        ValueError: If it has too few rows for the tokenizer, or too few positions for a block.
    """
    tokenizer, identity = load_tokenizer(tokens.tokenizer_folder), tokens.manifest.identity
    if tokenizer_sha256(tokenizer) != identity.tokenizer_sha256:
        raise DamagedShards(f"{tokens.tokenizer_folder} is not that of its shards; {REMEDY}")
    if (least := vocabulary_size(tokenizer)) != tokens.manifest.vocab_size:
        raise DamagedShards(f"{tokens.folder} has not the vocabulary of its tokenizer; {REMEDY}")
    shape = read_architecture(config.arch, config.vocab_size)
    text = shape.get_text_config()
    if text.vocab_size < least:
        raise ValueError(
            f"--arch {config.arch} has {text.vocab_size} rows and the tokenizer {least} tokens; "
            f"give --vocab-size {least} or more"
        )
    positions = getattr(text, "max_position_embeddings", None) or config.longest
    if positions < config.longest:
        raise ValueError(
            f"--arch {config.arch} has {positions} positions, blocks have {config.longest} tokens; "
            "give shorter ones"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(shape, name, getattr(tokenizer, name))
    return shape


def take_run(run: Run) -> dict[str, Any]:
    """Start or resume a run, take it to its end, and return its summary."""
    config, device, folder = run.config, run.place.device, run.config.output_dir
    num_parameters, in_embedding = count_parameters(run.shape)
    say(
        f"{config.arch}: {num_parameters:,} parameters, {in_embedding:,} of them in the embedding; "
        f"{run.tokens.num_tokens('train'):,} tokens to train on, compute dtype "
        f"{dtype_name(run.place.dtype)}"
    )
    record = run_folder.record_of(config, run.identity, command=COMMAND)
    write_json(folder / CONFIG, record)  # before anything that the run may resume from
    run.copies.push()  # a place that takes nothing is told before long work
    model = new_model(run.shape)
    device.place(model)
    trainer = make_pretrainer(config, model, run.place.dtype, sync=device.sync)
    progress = Progress()
    if has_state(folder):
        progress = read_state(folder, trainer)
        say(f"resuming from step {progress.step}")
    resume_step = progress.step or None
    track = open_tracker(folder, record, resume_step=resume_step, **config.tracking.sinks())
    batches_from = partial(token_batches, run.tokens, config, device.torch_device)
    with StateWriter(folder, **config.intervals.kept_states()) as states:
        hooks = make_hooks(run, trainer, track, states)
        progress = train_end_to_end(trainer, batches_from, config, hooks, progress)
    write_model(run, trainer, FINAL_NAME)
    summary = summary_of(progress, num_parameters)
    track.finish(summary)
    return summary


def make_hooks(run: Run, trainer: Trainer, track: Tracker, states: StateWriter) -> Hooks:
    """Return what the loop calls: evaluation, tracking, saving, going back."""
    config, folder = run.config, run.config.output_dir
    model, torch_device = trainer.model, run.place.device.torch_device

    def evaluate() -> dict[str, Any]:
        with trainer.averaged(), trainer.computing(), mode(model, is_training=False):
            values = evaluate_on_tokens(
                model,
                run.heldout,
                device=torch_device,
                num_sequences=config.intervals.eval_samples,
                is_separate=config.documents == "separate",
            )
            for domain in run.domains:
                found = domain.measure(model, torch_device)
                values[f"{domain.name}/perplexity"] = found["perplexity"]
        return values

    def save(progress: Progress) -> None:
        if config.intervals.keep_checkpoints is not None:
            write_model(run, trainer, f"checkpoints/step_{progress.step:07d}")
            run_folder.rotate(folder / "checkpoints", config.intervals.keep_checkpoints)
        states.wait()  # and for its copies, before a snapshot is taken for others
        states.save(progress, trainer, then=run.copies.begin())

    def restore() -> Progress | None:
        states.wait()
        if config.optim.on_nan == "stop" or not has_state(folder):
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


def write_model(run: Run, trainer: Trainer, name: str) -> None:
    """Write the model, in float32 and with its tokenizer, into the run's folder."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with trainer.averaged(), atomic_folder(run.config.output_dir / name) as folder:
        model: nn.Module = trainer.model
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        copy_text_files(run.tokens.tokenizer_folder, folder)


def summary_of(progress: Progress, num_parameters: int) -> dict[str, Any]:
    """Return the closing values of a run."""
    values = run_folder.summary_of(progress)
    of_students = [name for name in asdict(progress) if name.startswith("best_kl_nats")]
    kept = {name: value for name, value in values.items() if name not in of_students}
    return {"parameters": num_parameters, "best_perplexity": progress.best_perplexity, **kept}
