"""`qat compare`: runs side by side, on disk and, when asked, at W&B."""

from collections.abc import Sequence
from typing import Any

from qat.cli.command import run_command
from qat.reports.compare import (
    CompareConfig,
    compare_runs,
    make_run,
    markdown_table,
    write_comparison,
)
from qat.tracking.messages import say
from qat.tracking.sinks import read_project, send_comparison


def compare(config: CompareConfig) -> dict[str, Any]:
    """Write the comparison and show its numbers."""
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
    numbers = [dict(zip(made.numbers.header, row, strict=True)) for row in made.numbers.rows]
    return {
        "runs": numbers,
        "markdown": str(made.markdown),
        "page": str(made.page),
        "plot": str(made.plot) if made.plot else None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat compare", CompareConfig, compare, argv)
