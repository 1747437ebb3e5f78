"""The best KL of many sizes, next to files of other programs."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qat.cache.read import TeacherCache
from qat.export.from_gguf import gguf_contents, read_gguf_model
from qat.export.llama_quantize import find_quantizer
from qat.pipelines.compress_config import FrontierConfig
from qat.pipelines.compress_stages import (
    Clock,
    Measured,
    Source,
    cost_table,
    fit_plan,
    fit_sequences,
    measure_file,
    measure_model,
    once,
    size_on_disk,
    teacher_cache,
    train_student,
    validation_kl,
    write_file,
)
from qat.pipelines.open_checkpoint import open_checkpoint
from qat.pipelines.quick_fits import QuickFits
from qat.pipelines.stock_gguf import StockType, stock_files
from qat.quant.allocate import Table, allocate
from qat.reports.frontier import FrontierPoint, write_frontier
from qat.storage.files import folder_lock, sha256_of_file
from qat.tracking.messages import say


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontierResult:
    """The curve, and where it is shown."""

    points: list[dict[str, Any]]
    """Series, label, file_bytes, kl_nats and what else was measured, by series and size."""
    rank_correlation: float | None
    """Spearman's, of predicted and measured KL of fits; None for fewer than three."""
    markdown: Path
    plot: Path
    page: Path


def frontier(config: FrontierConfig) -> FrontierResult:
    """Make or find the file of each size, measure all and the peers, write the report."""
    source = Source.of(config, config.output / "work")
    peers = sorted(config.peers.glob("*.gguf")) if config.peers else []
    if config.stock:
        find_quantizer()  # before any long work
    if config.peers and not peers:
        raise ValueError(f"--peers {config.peers} holds no .gguf file")
    with folder_lock(source.work):
        cache = teacher_cache(source)
        table = cost_table(source, cache)
        stock = StockType.listed(config.stock)
        peers += stock_files(stock, source, cache, config.output / "stock") if stock else []
        if config.is_quick:
            points = quick_points(config, source, cache, table)
        else:
            points = [
                point
                for budget in config.budgets()
                for point in points_of_size(config, source, cache, table, budget)
            ]
        points += [point for path in peers if (point := peer_point(path, source, cache))]
        text = config.eval_text.name if config.eval_text else "the validation part of the data"
        what = "of fits in memory" if config.is_quick else "of files as they read back"
        report = write_frontier(
            points,
            config.output,
            title=f"{Path(config.model).name} to {config.to}",
            about=f"Exact KL to the full-precision model on {text}, {what}.",
        )
    return FrontierResult(
        points=[asdict(point) for point in points],
        rank_correlation=report.rank_correlation,
        markdown=report.markdown,
        plot=report.plot,
        page=report.page,
    )


def quick_points(
    config: FrontierConfig, source: Source, cache: TeacherCache, table: Table
) -> list[FrontierPoint]:
    """Return a point of each size, measured in memory: its bytes are those of the plan's file."""
    fits, points = QuickFits(source, cache), []
    for budget in config.budgets():
        found = allocate(table, budget - source.size.overhead_bytes)
        label = f"{budget / 1e6:g}MB"
        say(f"\n== {label}: predicted KL {found.cost:.4g}")
        values = measure_model(fits.student(source.size.plan(found)), source, cache)
        points.append(
            FrontierPoint(
                series="fit by moments",
                label=label,
                file_bytes=source.size.file_bytes(found),
                kl_nats=values["kl_nats"],
                predicted_kl_nats=found.cost,
                kl_p99=values["kl_p99"],
                top1_agreement=values["top1_agreement"],
            )
        )
    return points


def points_of_size(
    config: FrontierConfig, source: Source, cache: TeacherCache, table: Table, budget: int
) -> list[FrontierPoint]:
    """Return the points of a size: of the fit alone, and of the trained student if asked for."""
    allocation = allocate(table, budget - source.size.overhead_bytes)
    label = f"{budget / 1e6:g}MB"
    say(f"\n== {label}: predicted KL {allocation.cost:.4g}")
    clock = Clock(source.work / "clocks" / f"{label}.json", config.minutes)
    count = fit_sequences(allocation, source, cache, clock)
    fitted = fit_plan(allocation, source, cache, count)
    point = file_point("fit", label, fitted, source, cache, predicted=allocation.cost)
    clock.note()
    if not config.minutes:
        return [point]
    kl = validation_kl(fitted, source, cache)
    trained, _ = train_student(fitted, kl, source, cache, clock, allocation)
    return [point, file_point("trained", label, trained, source, cache)]


def file_point(
    series: str,
    label: str,
    student: Path,
    source: Source,
    cache: TeacherCache,
    *,
    predicted: float | None = None,
) -> FrontierPoint:
    """Write a student's file and return its point, measured after it was read back."""
    suffix = ".gguf" if source.config.to == "gguf" else ""
    output = source.work.parent / "files" / f"{label}-{series}{suffix}"
    write_file(student, source, output)
    key = [open_checkpoint(student).header.sha256, cache.fingerprint, str(source.config.eval_text)]
    values = once(
        source.work / "points" / f"{output.name}.json",
        key,
        lambda: measure_file(output, student, source, cache),
        Measured,
    )
    return FrontierPoint(
        series=series,
        label=label,
        file_bytes=size_on_disk(output),
        kl_nats=values["kl_nats"],
        predicted_kl_nats=predicted,
        kl_p99=values["kl_p99"],
        top1_agreement=values["top1_agreement"],
        note="",
    )


def peer_point(path: Path, source: Source, cache: TeacherCache) -> FrontierPoint | None:
    """Return the point of another program's file, with the types that it really holds.

    None for a file that cannot be read, such as one of types that only its own program knows.
    """
    say(f"\n== {path.name}")
    key = [sha256_of_file(path), cache.fingerprint, str(source.config.eval_text)]

    def measure() -> Measured:
        return measure_model(read_gguf_model(path, source.folder), source, cache)

    try:
        contents = gguf_contents(path)
        values = once(source.work / "points" / f"peer-{path.name}.json", key, measure, Measured)
    except ValueError as error:
        say(f"left out: {error}")
        return None
    return FrontierPoint(
        series="peers",
        label=path.stem,
        file_bytes=contents.file_bytes,
        kl_nats=values["kl_nats"],
        predicted_kl_nats=None,
        kl_p99=values["kl_p99"],
        top1_agreement=values["top1_agreement"],
        note=contents.note(),
    )
