"""Quality against file size: records of measured files, and their table, plot and page.

A point is one file. Points of a series are joined by a line, in the order of their bytes.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from qat.data.records import read_lines
from qat.reports.compare import Table, markdown_table, save_figure
from qat.reports.frontier_page import Mark, Series, as_page, frame_of, log_ticks, marks
from qat.storage.files import write_text
from qat.tracking.record import config_as_json, config_from_json

MB = 1e6
LEAST_KL = 1e-4  # nats; what is nearer to the teacher is drawn here: a log axis has no zero
POINTS = "frontier.jsonl"
AXES = ("file size (MB)", "KL to the teacher (nats)")


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontierPoint:
    """One measured file."""

    series: str
    """Who made it, or how."""
    label: str
    """What sets it apart in its series."""
    file_bytes: int
    kl_nats: float
    """Mean KL(teacher || file) over the whole vocabulary."""
    predicted_kl_nats: float | None = None
    """What the allocation expected, where one was asked."""
    kl_p99: float | None = None
    top1_agreement: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse numbers that no axis has."""
        numbers = (self.kl_nats, self.predicted_kl_nats, self.kl_p99, self.top1_agreement)
        if self.file_bytes < 1 or any(n is not None and not math.isfinite(n) for n in numbers):
            raise ValueError(
                f"{self.series} {self.label}: {self.file_bytes} bytes, {self.kl_nats} nats; "
                "a point needs bytes and finite numbers: measure the file again"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontierReport:
    """What was written."""

    points: Path
    markdown: Path
    plot: Path
    page: Path
    rank_correlation: float | None
    """Spearman's, of predicted and measured KL; None below three points that have both."""


def write_points(path: Path, points: Sequence[FrontierPoint]) -> None:
    """Write points as JSON lines."""
    write_text(path, "".join(json.dumps(config_as_json(point)) + "\n" for point in points))


def read_points(path: Path) -> list[FrontierPoint]:
    """Return the points of a file; refuse unknown keys and other types by name."""
    return [config_from_json(FrontierPoint, line, f"{path} ") for line in read_lines(path)]


def write_frontier(
    points: Sequence[FrontierPoint], output: Path, *, title: str, about: str = ""
) -> FrontierReport:
    """Write points, frontier.md, frontier.png and frontier.html into a folder.

    Args:
        points: In any order; series keep the order in which they first appear.
        output: The folder.
        title: Of the report.
        about: What was measured on what, in a sentence or two.

    Raises:
        ValueError: If there is no point.
    """
    if not points:
        raise ValueError("a frontier needs one measured file at least")
    points = in_order(points)
    paths = [output / POINTS, *(output / f"frontier.{suffix}" for suffix in ("md", "png", "html"))]
    correlation = rank_correlation(points)
    title, about = one_line(title), one_line(about)
    told = [text for text in (about, correlation_text(points, correlation)) if text]
    write_points(paths[0], points)
    table, series = frontier_table(points), drawn_series(points)
    draw(series, paths[2])
    parts = [f"# {title}", *told, markdown_table(table), f"![{title}]({paths[2].name})"]
    write_text(paths[1], "\n\n".join(parts) + "\n")
    write_text(paths[3], as_page(title, told, series, AXES, table))
    return FrontierReport(
        points=paths[0],
        markdown=paths[1],
        plot=paths[2],
        page=paths[3],
        rank_correlation=correlation,
    )


def in_order(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """Return points by series as these first appear, in each by bytes."""
    names = list(dict.fromkeys(point.series for point in points))
    return sorted(points, key=lambda p: (names.index(p.series), p.file_bytes, p.label))


def rank_correlation(points: Sequence[FrontierPoint]) -> float | None:
    """Return Spearman's correlation of predicted and measured KL, of those that have both.

    None below three of them, or where all are equal. Equal values share the mean of their ranks.
    """
    pairs = [(p.predicted_kl_nats, p.kl_nats) for p in points if p.predicted_kl_nats is not None]
    if len(pairs) < 3 or any(len(set(values)) == 1 for values in zip(*pairs, strict=True)):
        return None
    values = np.array(pairs).T  # (2, N)
    above = values[:, :, None] - values[:, None, :]
    ranks = np.sign(above).sum(-1)  # (2, N): twice the rank, around zero
    return float(np.corrcoef(ranks)[0, 1])


def correlation_text(points: Sequence[FrontierPoint], correlation: float | None) -> str:
    """Return what the report says of the prediction; nothing where there is none."""
    if correlation is None:
        return ""
    count = sum(point.predicted_kl_nats is not None for point in points)
    return f"Rank correlation of predicted and measured KL: {correlation:.3f} over {count} files."


def is_best(point: FrontierPoint, points: Sequence[FrontierPoint]) -> bool:
    """Return whether no file of at most a point's size is nearer to the teacher."""
    return not any(p.file_bytes <= point.file_bytes and p.kl_nats < point.kl_nats for p in points)


def frontier_table(points: Sequence[FrontierPoint]) -> Table:
    """Return a row a point; columns that no point fills are left out."""
    columns = {
        "file": [one_line(point.label) for point in points],
        "series": [one_line(point.series) for point in points],
        "MB": [f"{point.file_bytes / MB:.2f}" for point in points],
        "KL (nats)": [number_text(point.kl_nats, ".4f") for point in points],
        "predicted KL": [number_text(point.predicted_kl_nats, ".4f") for point in points],
        "KL 99%": [number_text(point.kl_p99, ".3f") for point in points],
        "top-1": [number_text(point.top1_agreement, ".1%") for point in points],
        "frontier": ["yes" if is_best(point, points) else "" for point in points],
        "note": [one_line(point.note) for point in points],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    return Table(list(filled), [list(row) for row in zip(*filled.values(), strict=True)])


def drawn_kl(nats: float) -> float:
    """Return where a KL is drawn."""
    return max(nats, LEAST_KL)


def drawn_series(points: Sequence[FrontierPoint]) -> list[Series]:
    """Return what the page draws: each series' points and what it says of them."""
    found = []
    for name in dict.fromkeys(point.series for point in points):
        own = [point for point in points if point.series == name]
        found.append(
            Series(
                name,
                [Mark(p.file_bytes / MB, drawn_kl(p.kl_nats), hover_lines(p)) for p in own],
                predicted(own),
            )
        )
    return found


def predicted(points: Sequence[FrontierPoint]) -> list[tuple[float, float]]:
    """Return MB and predicted KL of the points that have one."""
    known = [point for point in points if point.predicted_kl_nats is not None]
    return [(p.file_bytes / MB, drawn_kl(p.predicted_kl_nats)) for p in known]


def hover_lines(point: FrontierPoint) -> list[str]:
    """Return what a point tells: its label, then `name: value` a line."""
    told = {
        "series": point.series,
        "size": f"{point.file_bytes / MB:.2f} MB ({point.file_bytes:,} bytes)",
        "KL": f"{point.kl_nats:.4g} nats",
        "predicted KL": number_text(point.predicted_kl_nats, ".4g", " nats"),
        "KL 99%": number_text(point.kl_p99, ".4g", " nats"),
        "top-1": number_text(point.top1_agreement, ".1%"),
        "note": point.note,
    }
    lines = [point.label, *(f"{name}: {value}" for name, value in told.items() if value)]
    return [one_line(line) for line in lines]


def one_line(text: str) -> str:
    """Return a text without line breaks, as a row of Markdown has to be."""
    return " ".join(text.split())


def number_text(value: float | None, form: str, unit: str = "") -> str:
    """Return a number with its unit; nothing for None."""
    return "" if value is None else f"{value:{form}}{unit}"


def draw(all_series: Sequence[Series], path: Path) -> Path:
    """Draw KL, on a log axis, against MB; what was predicted is dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    panel, frame = figure.subplots(), frame_of(all_series)
    for series, (color, _, marker) in zip(all_series, cycle(marks()), strict=False):
        x, y, _ = zip(*series.marks, strict=True)
        panel.plot(x, y, color=color, marker=marker, label=series.name)
        if series.predicted:
            panel.plot(*zip(*series.predicted, strict=True), color=color, alpha=0.5, linestyle="--")
    panel.set(xlabel=AXES[0], ylabel=AXES[1], yscale="log", xlim=(frame.left, frame.right))
    panel.set_ylim(10**frame.bottom, 10**frame.top)
    panel.minorticks_off()
    values = log_ticks(frame.bottom, frame.top)
    panel.set_yticks(values, [f"{value:g}" for value in values])
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.3)
    is_predicted = any(series.predicted for series in all_series)
    panel.legend(title="dashed: predicted" if is_predicted else None, frameon=False)
    return save_figure(figure, path)
