"""Runs side by side: which settings differ, final and best numbers, curves over three axes.

Reads run folders only (`record`), so it works without the machine or the project at W&B.
"""

import base64
import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from qat.storage.files import atomic_file, write_text
from qat.tracking.record import (
    KL_NAMES,
    METRICS,
    SETTINGS,
    SUMMARY,
    flat_settings,
    read_config,
    read_rows,
    read_summary,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KL_CURVES = tuple(f"eval/{name}" for name in KL_NAMES)  # the first one names the best step
FINAL = ("train/loss", *KL_CURVES, "eval/kd_loss", "eval/perplexity", "eval/top1_agreement")
BITS = ("bits_per_weight", "bits_per_weight_mlp", "bits_per_weight_model")
CURVES = {
    "train/loss": "training loss",
    "eval/kl_nats": "held-out KL (nats)",
    "eval/kl_nats_lower": "held-out KL,\nlower bound (nats)",
}
AXES = {"step": "steps", "train/tokens_seen": "tokens", "train/seconds": "seconds"}
NAMES = ("output_dir", "output", "tracking.name")  # settings that name a run, so always differ
LARGE = 10_000.0  # from here on, fractions are noise
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border: 1px solid #bbb; padding: 0.2em 0.7em; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }"""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """Put runs side by side: differing settings, final and best numbers, loss curves."""

    runs: Positional[tuple[Path, ...]]
    """Run folders; a folder without metrics or summary is left out with a note. None: the runs of
    --wandb-project."""
    output: Path = Path("runs/compare")
    """Folder for compare.md, compare.png and compare.html."""
    wandb_project: str | None = None
    """With run folders: also send table, plot and page to this W&B project, as one run."""
    wandb_group: str | None = None
    """Without run folders: only the project's runs of this group."""

    def __post_init__(self) -> None:
        """Refuse a call that names no run."""
        if not self.runs and self.wandb_project is None:
            raise ValueError(
                "RUN: no folder given; name one or more, such as runs/demo/*, or --wandb-project"
            )
        if self.wandb_group and (self.runs or self.wandb_project is None):
            raise ValueError(
                f"--wandb-group {self.wandb_group} chooses among the runs of a project; "
                "give --wandb-project and no folder"
            )


@dataclass(frozen=True, slots=True)
class Run:
    """What a run's folder tells."""

    name: str
    config: dict[str, Any]
    """Flat: nested keys joined by dots."""
    rows: dict[int, dict[str, Any]]
    """Step to all that was logged at it, ascending."""
    summary: dict[str, Any]

    def series(self, key: str) -> list[tuple[int, float]]:
        """Return (step, value) where the key was logged with a finite number."""
        return [(step, row[key]) for step, row in self.rows.items() if row.get(key) is not None]


@dataclass(frozen=True, slots=True)
class Table:
    """A header and rows of text and numbers."""

    header: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The written comparison."""

    numbers: Table
    settings: Table
    markdown: Path
    page: Path
    plot: Path | None
    """None when no run logged a curve."""
    skipped: list[Path]


def compare_runs(folders: Sequence[Path], output: Path) -> Comparison:
    """Read runs and write compare.md, compare.html and, where there are curves, compare.png."""
    return write_comparison(*read_runs(folders), output)


def write_comparison(runs: Sequence[Run], skipped: list[Path], output: Path) -> Comparison:
    """Write the comparison of runs, wherever they were read from."""
    numbers, settings = numbers_table(runs), settings_table(runs)
    output = Path(output)
    plot = plot_curves(runs, output / "compare.png")
    markdown, page = output / "compare.md", output / "compare.html"
    write_text(markdown, as_markdown(numbers, settings, plot))
    write_text(page, as_page(numbers, settings, plot))
    return Comparison(numbers, settings, markdown, page, plot, skipped)


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[Path]]:
    """Return the runs among some paths, and the paths that are none.

    Raises:
        FileNotFoundError: If a path is absent.
        ValueError: If no path is a run.
    """
    folders = [Path(folder) for folder in folders]
    for folder in folders:
        if not folder.exists():
            raise FileNotFoundError(f"RUN {folder} does not exist; `ls runs` shows what does")
    found = [path for path in folders if (path / METRICS).is_file() or (path / SUMMARY).is_file()]
    if not found:
        raise ValueError(f"RUN {folders[0]}: no {METRICS} or {SUMMARY} in it; name run folders")
    names = [folder.resolve().name for folder in found]
    runs = [
        read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(found, names, strict=True)
    ]
    return runs, [folder for folder in folders if folder not in found]


def read_run(folder: Path, name: str) -> Run:
    """Return one run; rows of the same step are merged, the later one counts."""
    return make_run(name, read_config(folder), read_rows(folder), read_summary(folder))


def make_run(
    name: str, config: dict[str, Any], rows: Iterable[dict[str, Any]], summary: dict[str, Any]
) -> Run:
    """Return a run of nested settings and of rows that have a `step`."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(row["step"], {}).update(row)
    return Run(
        name, flat_settings(config.get(SETTINGS, config)), dict(sorted(merged.items())), summary
    )


def settings_table(runs: Sequence[Run]) -> Table:
    """Return the settings that are not the same in all runs that tell theirs, a column a run."""
    runs = [run for run in runs if run.config]
    keys = sorted({key for run in runs for key in run.config} - set(NAMES))
    rows = []
    for key in keys:
        values = [json.dumps(run.config[key]) if key in run.config else "" for run in runs]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return Table(["setting", *(run.name for run in runs)], rows)


def numbers_table(runs: Sequence[Run]) -> Table:
    """Return final and best numbers, a row a run; columns that no run can fill are left out."""
    all_numbers = [numbers_of(run) for run in runs]
    columns = [key for key in all_numbers[0] if any(row[key] is not None for row in all_numbers)]
    rows = [
        [run.name, *(row[key] for key in columns)]
        for run, row in zip(runs, all_numbers, strict=True)
    ]
    return Table(["run", *columns], rows)


def numbers_of(run: Run) -> dict[str, Any]:
    """Return a run's numbers; None where it does not tell. Unlogged ones come from the summary."""
    lowest = {
        key: min(run.series(key), key=lambda pair: pair[1], default=None) for key in KL_CURVES
    }
    tokens, seconds = (final(run, key) for key in ("train/tokens_seen", "train/seconds"))
    return {
        "steps": max(run.rows, default=run.summary.get("steps")),
        **{
            f"best_{name}": lowest[key][1] if lowest[key] else run.summary.get(f"best_{name}")
            for key, name in zip(KL_CURVES, KL_NAMES, strict=True)
        },
        "best_step": next((pair[0] for pair in lowest.values() if pair), None),
        **{f"final_{key.split('/')[1]}": final(run, key) for key in FINAL},
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if tokens and seconds else None,
        **{key: run.summary.get(key) for key in BITS},
    }


def final(run: Run, key: str) -> float | None:
    """Return the last logged value of a key, else the summary's."""
    series = run.series(key)
    return series[-1][1] if series else run.summary.get(key.split("/")[1])


def plot_curves(runs: Sequence[Run], path: Path) -> Path | None:
    """Draw each curve against steps, tokens and seconds; None when no run has one."""
    curves = [key for key in CURVES if any(run.series(key) for run in runs)]
    if not curves:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6 * len(curves)), layout="constrained")
    axes = figure.subplots(len(curves), len(AXES), squeeze=False, sharey="row")
    for row, key in zip(axes, curves, strict=True):
        row[0].set_ylabel(CURVES[key])
        for panel, axis in zip(row, AXES, strict=True):
            panel.set_xlabel(AXES[axis])
            panel.grid(alpha=0.3)
            panel.locator_params(axis="x", nbins=5)
            for color, run in enumerate(runs):
                x, y = along(run, key, axis)
                if x:
                    # A color belongs to a run, also where another run has no curve.
                    panel.plot(x, y, color=f"C{color}", marker="." if len(x) < 30 else None)
    drawn = [color for color, run in enumerate(runs) if any(run.series(key) for key in curves)]
    handles = [axes[0][0].plot([], [], color=f"C{color}")[0] for color in drawn]
    figure.legend(
        handles, [runs[color].name for color in drawn], loc="outside upper center", ncols=4
    )
    return save_figure(figure, path)


def save_figure(figure: "Figure", path: Path) -> Path:
    """Write a figure as PNG, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with atomic_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)
    return path


def along(run: Run, key: str, axis: str) -> tuple[list[float], list[float]]:
    """Return a curve's x and y; between logged steps, tokens and seconds are interpolated."""
    from numpy import interp

    series = run.series(key)
    steps, values = [step for step, _ in series], [value for _, value in series]
    if axis == "step":
        return steps, values
    clock = [(0, 0.0), *run.series(axis)]
    if len(clock) == 1:
        return [], []
    return interp(steps, *zip(*clock, strict=True)).tolist(), values


def as_markdown(numbers: Table, settings: Table, plot: Path | None) -> str:
    """Return the comparison as Markdown; the plot is in the same folder."""
    parts = ["# Runs compared", markdown_table(numbers)]
    if settings.rows:
        parts += ["## Settings that differ", markdown_table(settings)]
    if plot:
        parts += [f"![curves]({plot.name})"]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """Return a table in Markdown."""
    lines = [table.header, ["---"] + ["---:"] * (len(table.header) - 1), *table.rows]
    cells = [[show(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def as_page(numbers: Table, settings: Table, plot: Path | None) -> str:
    """Return the comparison as one HTML page that needs no other file."""
    parts = ["<h1>Runs compared</h1>", html_table(numbers)]
    if settings.rows:
        parts += ["<h2>Settings that differ</h2>", html_table(settings)]
    if plot:
        data = base64.b64encode(plot.read_bytes()).decode()
        parts += [f'<img alt="curves" src="data:image/png;base64,{data}">']
    head = f'<meta charset="utf-8"><title>Runs compared</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    return f"<!doctype html>\n<html><head>{head}</head>\n<body>\n{body}\n</body></html>\n"


def html_table(table: Table) -> str:
    """Return a table in HTML."""

    def row(cells: Sequence[object], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(show(cell))}</{tag}>" for cell in cells)

    lines = [row(table.header, "th"), *(row(cells, "td") for cells in table.rows)]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def show(cell: object) -> str:
    """Return a cell's text: four digits for fractions, nothing for None."""
    if isinstance(cell, float):
        return f"{cell:.4g}" if abs(cell) < LARGE else f"{cell:.0f}"
    return "" if cell is None else str(cell)
