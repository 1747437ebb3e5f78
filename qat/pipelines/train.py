"""The story of a training run.

Open the student and its cache, choose what trains, take steps, keep the best, write the end.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from time import strftime
from typing import Any

from torch import nn

from qat.cache.read import TeacherCache
from qat.calibrate.layered import opened
from qat.evaluate.kl import Numbers
from qat.evaluate.on_cache import evaluate_on_cache
from qat.legacy.fp16_snap import snap_student
from qat.legacy.run_files import BEST_FILE, TIME_FORMAT, why_no_seed_files, write_seed_files
from qat.model.checkpoint import (
    CheckpointHeader,
    bits_per_weight,
    student_tensors,
    write_checkpoint,
)
from qat.model.layered import NeedsWhole, open_layered
from qat.model.load import BaseWeights, load_dense, load_tokenizer
from qat.model.sharding import gather_in_use, split_parameters, split_rows
from qat.model.surgery import has_low_rank_scales
from qat.pipelines.open_cache import open_cache
from qat.pipelines.open_checkpoint import (
    BEST_NAME,
    FINAL_NAME,
    Checkpoint,
    latent_or_base_weights,
    open_checkpoint,
)
from qat.pipelines.perplexity import Domain, perplexities, read_domains
from qat.pipelines.place import Place
from qat.pipelines.runs import MeasuredResult, held_folder, open_run_tracker
from qat.pipelines.split_choice import needs_split
from qat.runtime import distributed
from qat.runtime.device import dtype_name, is_traced
from qat.runtime.distributed import from_first, own_part
from qat.runtime.launch import is_first
from qat.storage.decode import as_type
from qat.storage.files import write_json
from qat.tracking.messages import say
from qat.tracking.record import CONFIG, SUMMARY
from qat.tracking.sinks import Tracker
from qat.train import run_folder
from qat.train.blockwise import Teacher
from qat.train.config import TrainConfig
from qat.train.copies import RunCopies
from qat.train.layerwise import layerwise_stage
from qat.train.loop import DivergedError, Hooks, train_end_to_end
from qat.train.state import Progress, StateWriter, has_state, read_state
from qat.train.step import Trainer
from qat.train.trainable import check_averages, mode

Keep = Callable[[str, dict[str, Any], int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a run ended."""

    checkpoint: str
    """The best student's folder."""
    best_kl_nats: float | None
    """Least held-out KL; None where no held-out position counts."""
    best_kl_nats_lower: float | None
    """In its place from a cache that keeps a part of the logits: a lower bound."""
    best_step: int | None
    final_loss: float | None
    steps: int
    tokens_seen: int
    tokens_per_second: float
    seconds: float
    rollbacks: int
    """Times that the run went back to a saved state."""
    bits_per_weight: float | None
    bits_per_weight_mlp: float | None
    bits_per_weight_model: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a run works with, opened and checked, nothing of it loaded yet."""

    config: TrainConfig
    place: Place
    student: Checkpoint
    cache: TeacherCache
    eval_cache: TeacherCache
    domains: list[Domain]
    """Texts that are measured in addition to the cache's held-out split."""
    identity: dict[str, Any]
    copies: RunCopies


def train(config: TrainConfig) -> TrainResult | MeasuredResult:
    """Distil a teacher's cache into a student, or find the run already complete.

    Raises:
        ValueError: If student, caches, settings and folder do not fit each other, the folder is in
            use, or the loss diverged.
        FileNotFoundError: If student or cache is not there.
    """
    run = open_run(config)
    if run.config.eval_only:
        return measure(run)
    with held_folder(run.config, run.identity, run.place.device, run.copies) as summary:
        if summary is None:
            summary = take_run(as_divided(run))
    folder = run.config.output_dir
    values = {"checkpoint": str(folder / BEST_NAME), **summary}
    return as_type(values, TrainResult, folder / SUMMARY)


def measure(run: Run) -> MeasuredResult:
    """Measure the run's best student, or the one that it starts from, without training."""
    with distributed.joined(run.place.device):
        from_first(run.copies.bring)
        best = run.config.output_dir / BEST_NAME
        student = open_checkpoint(best) if best.is_dir() else run.student
        model = student.load(dtype=run.place.dtype)
        with run.place.device.hosting(model):
            numbers = held_out_numbers(run, model)
    return MeasuredResult(checkpoint=str(student.path), numbers=numbers)


def held_out_numbers(run: Run, model: nn.Module, *, is_shared: bool = True) -> Numbers:
    """Return a student's numbers on the cache's held-out split and the texts, in eval mode."""
    numbers = evaluate_on_cache(
        model,
        run.eval_cache,
        device=run.place.device.torch_device,
        dtype=run.place.dtype,
        num_sequences=run.config.intervals.eval_samples,
        is_shared=is_shared,
    )
    device = run.place.device.torch_device
    return numbers | perplexities(run.domains, model, device, is_shared=is_shared)


def open_run(config: TrainConfig) -> Run:
    """Look up student, caches, device and dtype; refuse what does not fit."""
    place = Place.of(config)
    student = open_checkpoint(config.checkpoint, model_id=config.model_id)
    header = student.require_student(
        f"--checkpoint {student.path}", "`qat init-student` makes a student of it"
    )
    teacher = header.base_model["weights"]
    cache = open_cache(config.cache_dir, student.text_folder, teacher)
    eval_cache = open_cache(config.eval_cache_dir, student.text_folder, teacher) or cache
    check_averages(config.optim.averages, place.device.torch_device)
    run_folder.check_processes(config, place.device.torch_device)
    run_folder.check_lengths(config, cache.seq_len)
    run_folder.check_content(config, cache.manifest.identity.content)
    domains = read_domains(
        config.eval_sets,
        load_tokenizer(student.text_folder),
        window=cache.seq_len,
        stride=max(1, cache.seq_len // 2),
    )
    identity = run_folder.run_identity(
        config,
        header.sha256,
        cache.fingerprint,
        eval_cache.fingerprint,
        device_kind=place.device.kind,
        dtype=dtype_name(place.dtype),
    )
    copies = RunCopies(config.output_dir, config.tracking.copy_to)
    return Run(
        config=replace(config, output_dir=copies.folder),
        place=place,
        student=student,
        cache=cache,
        eval_cache=eval_cache,
        domains=domains,
        identity=identity,
        copies=copies,
    )


def as_divided(run: Run) -> Run:
    """Return a run whose processes hold rows of weights where they have to."""
    split = partial(needs_split, run.config, run.student, run.cache, run.place)
    return replace(run, config=replace(run.config, shard=from_first(split)))


def take_run(run: Run) -> dict[str, Any]:
    """Start or resume a run, take it to its end, and return its summary."""
    config, device, header = run.config, run.place.device, run.student.header
    folder, base = config.output_dir, config.model_id or header.base_model["path"]
    model = run.student.load(dtype=run.place.dtype)
    if run_folder.is_split(config):
        split_rows(model)
    device.place(model)
    weight_of = latent_or_base_weights(run.student, {**header.base_model, "path": base})
    record = run_folder.record_of(config, run.identity, latent_start(config, model, weight_of))
    if is_first():
        write_json(folder / CONFIG, record)  # before anything that the run may resume from
        run.copies.push()  # a place that takes nothing is told before long work
    progress, resumes = Progress(), from_first(partial(has_state, folder))
    if config.layerwise.sequences and not resumes:
        progress.seconds = train_layer_by_layer(run, model, base, weight_of)
    trainer = run_folder.make_trainer(
        config, model, run.place.dtype, weight_of=weight_of, sync=device.sync
    )
    if run_folder.is_split(config):
        gather_in_use(model, run.place.dtype)
        trainer.split = split_parameters(model)
    seen = run.cache.seen_tokens(model.config.get_text_config().vocab_size)
    trainer.seen = seen.to(device.torch_device)
    count = f"{trainer.num_trained:,} parameters in {len(trainer.layers)} layers"
    say(f"training {count}, compute dtype {dtype_name(run.place.dtype)}")
    if resumes:
        progress = read_state(folder, trainer)
        say(f"resuming from step {progress.step}")
    track = open_run_tracker(folder, config.tracking, record, progress)
    made_by = {"command": run_folder.COMMAND, **run.identity}
    header = replace(header, cache_fingerprint=run.cache.fingerprint, made_by=made_by)
    keep = partial(write_student, run, trainer, header)
    intervals = config.intervals
    batches_from = partial(
        run_folder.training_batches,
        run.cache,
        config,
        device.torch_device,
        vocab_size=model.config.vocab_size,
    )
    with StateWriter(folder, **intervals.kept_states()) as states, naming_parameter(model):
        hooks = make_hooks(run, trainer, track, keep, states)
        progress = train_end_to_end(trainer, batches_from, config, hooks, progress)
    keep(FINAL_NAME, progress.last_eval, progress.step)
    if is_first():
        leave_seed_files(run, base, weight_of)
    summary = run_folder.summary_of(progress) | bits_per_weight(model)
    track.finish(summary)
    return summary


@contextmanager
def naming_parameter(model: nn.Module) -> Iterator[None]:
    """Add to what ends a run the first trained parameter that is not finite, or its gradient."""
    try:
        yield
    except DivergedError as error:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        found = (
            name
            for name, parameter in named
            for one in (parameter, parameter.grad)
            if one is not None and not own_part(one).isfinite().all()
        )
        name = next(found, None)
        where = f"{name} is the first parameter that is not finite; " if name else ""
        raise DivergedError(f"{error}; {where}train with a lower --optim.lr") from error


def latent_start(config: TrainConfig, model: nn.Module, weights: BaseWeights) -> str | None:
    """Return what latent weights start from, None without any; say so if not full precision."""
    if "weights" not in config.parts(is_low_rank=has_low_rank_scales(model)):
        return None
    if weights.why_missing is None:
        return "full-precision weights"
    say(
        f"no full-precision weights ({weights.why_missing}): latent weights start at the student's "
        "quantized values; give the model that it was made from with --model-id"
    )
    return f"quantized values: {weights.why_missing}"


def train_layer_by_layer(run: Run, model: nn.Module, base: str, weight_of: BaseWeights) -> float:
    """Take the layer-by-layer stage of a run; return its seconds."""
    try:
        return layerwise_stage(
            run.config,
            model,
            open_teacher(base, run.place),
            run.cache,
            weight_of=weight_of,
            rates=run_folder.peak_rates(run.config.optim, run.config.layerwise.lr),
            device=run.place.device.torch_device,
            dtype=run.place.dtype,
        )
    except NeedsWhole as why:
        raise ValueError(f"{why}; train without --layerwise.sequences") from why


def open_teacher(base: str, place: Place) -> Teacher:
    """Return a full-precision model, read one decoder layer at a time where its files let that."""
    if not is_traced(place.device.torch_device):
        try:
            layered = open_layered(base, place.dtype)
        except NeedsWhole as why:
            say(f"{why}: the teacher is loaded as a whole")
        else:
            return Teacher(layered.model, partial(opened, layered, place.device))
    teacher = load_dense(base, dtype=place.dtype)
    place.device.place(teacher)
    return Teacher(teacher)


def write_student(
    run: Run,
    trainer: Trainer,
    header: CheckpointHeader,
    name: str,
    values: dict[str, Any],
    step: int,
) -> None:
    """Write the student at a step, with its held-out numbers, into the run's folder."""
    if not is_first() and not trainer.split:
        return
    header = replace(header, metrics={**values, "step": step})
    folder, text_source = run.config.output_dir / name, run.student.text_folder
    with trainer.averaged():
        tensors = student_tensors(trainer.model)  # of all processes
        if is_first():
            write_checkpoint(
                trainer.model, header, folder, text_source=text_source, tensors=tensors
            )


def leave_seed_files(run: Run, base: str, weight_of: BaseWeights) -> None:
    """Write the run's students in the seeds' form as well, or say why not."""
    why = why_no_seed_files(run.student.header.plan, came_in_theirs=run.student.path.is_file())
    if why is not None:
        say(f"no {BEST_FILE}: {why}")
        return
    names = write_seed_files(
        run.config.output_dir,
        best=BEST_NAME,
        last=FINAL_NAME,
        model_id=base,
        time=strftime(TIME_FORMAT),
        weight_of=weight_of,
        snap=partial(snap_student, bake=True),
    )
    say(f"in the seeds' form: {', '.join(names)}")


def make_hooks(
    run: Run, trainer: Trainer, track: Tracker, keep: Keep, states: StateWriter
) -> Hooks:
    """Return what the loop calls: evaluation, tracking, saving, going back."""
    config, folder = run.config, run.config.output_dir

    def evaluate() -> dict[str, Any]:
        with trainer.averaged(), mode(trainer.model, is_training=False):
            return held_out_numbers(run, trainer.model, is_shared=not trainer.split)

    def save(progress: Progress) -> None:
        if config.intervals.keep_checkpoints is not None:
            keep(f"checkpoints/step_{progress.step:07d}", progress.last_eval, progress.step)
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
        hard_weight=config.hard_weight,
        evaluate=evaluate,
        track=track,
        keep_best=partial(keep, BEST_NAME),
        save=save,
        restore=restore,
    )
