"""Compare runs in a table, curves and one HTML page."""

from dataclasses import dataclass
from typing import Any

from qat.reports.compare import (
    CompareConfig,
    compare_runs,
    make_run,
    markdown_table,
    write_comparison,
)
from qat.tracking.messages import say
from qat.tracking.sinks import read_project, send_comparison


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareResult:
    """The numbers of each run, and where the comparison is."""

    runs: list[dict[str, Any]]
    """Name and numbers of each run."""
    markdown: str
    """The tables."""
    page: str
    """The HTML page with tables and curves."""
    plot: str | None
    """The curves; None where no run has any."""


def compare(config: CompareConfig) -> CompareResult:
    """Compare runs on disk, or those of a W&B project; send the comparison there if asked."""
    if config.runs:
        made = compare_runs(config.runs, config.output)
    else:
        found = read_project(config.wandb_project, config.wandb_group)
        made = write_comparison([make_run(**run) for run in found], [], config.output)
    for path in made.skipped:
        say(f"left out {path}: no metrics or summary in it")
    say(markdown_table(made.numbers))
    if config.wandb_project and config.runs:
        table = {"header": made.numbers.header, "rows": made.numbers.rows}
        send_comparison(config.output, config.wandb_project, page=made.page, **table)
    return CompareResult(
        runs=[dict(zip(made.numbers.header, row, strict=True)) for row in made.numbers.rows],
        markdown=str(made.markdown),
        page=str(made.page),
        plot=str(made.plot) if made.plot else None,
    )
