"""The best file of a size: formats chosen by what they cost, fitted, trained, exported, measured.

    cache > costs > plan > fit > train > export > measure

Each stage leaves its result in a folder next to the output, so that a killed run continues there.
Processes that torchrun started share all that reads text or trains; the first one writes.
"""

from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from qat.cache.read import TeacherCache
from qat.pipelines.compress_config import CompressConfig, parse_size
from qat.pipelines.compress_stages import (
    REMEDY,
    Clock,
    Kept,
    Source,
    byte_table,
    cost_table,
    export_record,
    fit_id,
    fit_plan,
    fit_sequences,
    measure_file,
    once,
    size_on_disk,
    teacher_cache,
    train_student,
    validation_kl,
    write_file,
)
from qat.pipelines.plan import print_table
from qat.quant.allocate import Allocation, Table, allocate, frontier, smallest
from qat.runtime.distributed import from_first, joined
from qat.runtime.launch import is_first
from qat.runtime.memory import peak_rss_bytes
from qat.storage.decode import read_as
from qat.storage.files import fingerprint, folder_lock, sweep_leftovers
from qat.tracking.messages import say

STAGES = ("cache", "costs", "plan", "fit", "train", "export", "measure")
SEARCH_ROUNDS = 3  # fits that --kl takes, more only where none of them is within the limit
MOST_ROUNDS = 6
NEAR = 0.9  # of the KL that is asked for: a smaller file is not searched below it


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressResult:
    """A finished file, measured after it was read back."""

    path: str
    """The file or folder."""
    file_bytes: int
    """All of it."""
    bits_per_weight_model: float
    """8 * file_bytes / parameters of the model."""
    kl_nats: float
    """Mean KL(teacher || file) over the whole vocabulary."""
    kl_p99: float
    """The KL that 1% of the tokens exceed."""
    top1_agreement: float
    """Share of tokens where both have the same likeliest token."""
    perplexity: float | None
    perplexity_teacher: float | None
    measured_on: str
    """The text of the five numbers above."""
    kl_nats_predicted: float
    """By the table of costs, before the fit."""
    kl_nats_fit: float
    """On the validation part of the data, before training."""
    kl_nats_validation: float
    """On the same part, of the student that was exported."""
    seconds: float
    """Of all stages; what a killed stage had done is not counted."""
    peak_rss_bytes: int
    plan: dict[str, str]
    """Format of each tensor."""


def compress(config: CompressConfig) -> CompressResult:
    """Make the best file of a size, or find it already made.

    Raises:
        ValueError: If the size is below the smallest plan's, the target cannot hold the model, or
            the output exists.
        FileNotFoundError: If model or data are not there.
    """
    source = Source.of(config, config.work_folder)
    budget = budget_bytes(config, source)
    skipped = ("output", "work", "device", "model")
    settings = {f.name: str(getattr(config, f.name)) for f in fields(config)}
    key = [source.base["weights"], {k: v for k, v in settings.items() if k not in skipped}]
    lock = folder_lock(source.work) if is_first() else nullcontext()
    with joined(source.place.device), lock:
        result = source.work / "results" / f"{config.output.name}.json"
        from_first(partial(prepare, config.output, source.work, result, key))
        return once(result, key, lambda: take_stages(config, source, budget), CompressResult)


def prepare(output: Path, work: Path, result: Path, key: object) -> None:
    """Free a work folder of what a kill left, and check what is at the output."""
    sweep_leftovers(work)
    check_output(output, work, result, key)


def check_output(output: Path, work: Path, result: Path, key: object) -> None:
    """Refuse to replace a finished file of other settings, or one that was not made here."""
    if not output.exists():
        result.unlink(missing_ok=True)
    elif result.is_file():
        if read_as(result, Kept, remedy=REMEDY).key != fingerprint(key):
            raise ValueError(
                f"the output {output} was made with other settings; remove it or name another"
            )
    elif not export_record(work, output).is_file():
        raise ValueError(f"the output {output} exists; remove it or name another")


def budget_bytes(config: CompressConfig, source: Source) -> int | None:
    """Return the bytes of the largest file; None where the KL decides. Refuse too few."""
    if config.kl is not None:
        return None
    budget = int((config.bits_per_weight or 0) * source.size.num_weights / 8)
    budget = budget if config.size is None else parse_size(config.size)
    least = source.size.file_bytes(smallest(byte_table(source)))
    if budget < least:
        flag = "--size" if config.size else "--bits-per-weight"
        raise ValueError(
            f"{flag} asks for {budget:,} bytes, below the smallest {config.to} file of this model: "
            f"{least:,} bytes ({least / 1e6:.1f}MB); give at least that"
        )
    return budget


def take_stages(config: CompressConfig, source: Source, budget: int | None) -> dict[str, Any]:
    """Go through the stages that are left, and return the values of the result."""
    clock = Clock(source.work / "clocks" / f"{config.output.name}.json", config.minutes)
    say_stage("cache", clock)
    cache = clock.shared_stage("cache", lambda: teacher_cache(source))
    say_stage("costs", clock)
    table = clock.shared_stage("costs", lambda: cost_table(source, cache))
    say_stage("plan", clock)
    if budget is None:
        found = search_by_kl(config.kl, table, source, cache, clock)
    else:
        found = allocate(table, budget - source.size.overhead_bytes)
    plan = source.size.plan(found)
    print_table(plan, source.size.file_bytes(found))
    say_stage("fit", clock, found.cost)
    count = fit_sequences(found, source, cache, clock)
    fit = f"fit-{fit_id(found, source, cache, count)}"
    fitted = clock.shared_stage(fit, lambda: fit_plan(found, source, cache, count))
    kl_fit = validation_kl(fitted, source, cache)
    say_stage("train", clock, kl_fit)
    student, kl = train_student(fitted, kl_fit, source, cache, clock, found)
    say_stage("export", clock, kl)
    write_file(student, source, config.output)
    say_stage("measure", clock, kl)
    values = measure_file(config.output, student, source, cache)
    file_bytes = size_on_disk(config.output)
    return {
        "path": str(config.output),
        "file_bytes": file_bytes,
        "bits_per_weight_model": round(8 * file_bytes / source.size.num_weights, 4),
        **values,
        "kl_nats_predicted": found.cost,
        "kl_nats_fit": kl_fit,
        "kl_nats_validation": kl,
        "seconds": round(clock.seconds, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "plan": plan.to_dict()["tensors"],
    }


def say_stage(name: str, clock: Clock, kl: float | None = None) -> None:
    """Note where a run stands, and say it: stage, time left, KL so far."""
    clock.note()
    left = f"{max(0.0, clock.left) / 60:.1f} min left" if clock.limit else "no training"
    known = "" if kl is None else f", KL {'about ' if name == 'fit' else ''}{kl:.4g}"
    say(f"\n== {STAGES.index(name) + 1}/{len(STAGES)} {name}: {left}{known}")


def search_by_kl(
    limit: float, table: Table, source: Source, cache: TeacherCache, clock: Clock
) -> Allocation:
    """Return the smallest allocation found whose fit keeps the validation KL within a limit.

    Each fit tells how far predictions are off, which moves the next size.
    """
    points, target = list(frontier(table)), limit
    best: Allocation | None = None
    for number in range(1, MOST_ROUNDS + 1):
        found = next((point for point in points if point.cost <= target), points[-1])
        count = fit_sequences(found, source, cache, clock)
        kl = validation_kl(fit_plan(found, source, cache, count), source, cache)
        file_bytes = source.size.file_bytes(found)
        say(f"{file_bytes:,} bytes: KL {kl:.4g}, predicted {found.cost:.4g}, limit {limit:.4g}")
        if kl <= limit and (best is None or found.num_bytes < best.num_bytes):
            best = found
        is_enough = best is not None and number >= SEARCH_ROUNDS
        if is_enough or NEAR * limit <= kl <= limit or (found is points[-1] and kl > limit):
            break
        # Fits of nearly the same size are not in the order of their bytes: late steps are wider.
        aim = NEAR ** (0.5 if number < SEARCH_ROUNDS else 3)
        target = found.cost * aim * limit / max(kl, 1e-12)
    if best is None:
        raise ValueError(
            f"--kl {limit} is below what {source.config.to} reached here: {kl:.4g} at "
            f"{file_bytes:,} bytes; give more, or a --size"
        )
    return best
