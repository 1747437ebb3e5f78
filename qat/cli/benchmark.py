"""`qat benchmark`: the largest batch that fits and the fastest one, measured in fresh processes."""

import shlex
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

from qat.benchmark.config import BenchmarkConfig
from qat.cli.command import run_command
from qat.pipelines.batch_probe import describe, probe
from qat.tracking.messages import say

MOST_PROBES = 8  # of a search; where it ends sooner, smaller batches are timed as well


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat benchmark", BenchmarkConfig, act, argv)


def act(config: BenchmarkConfig) -> dict[str, Any]:
    """Measure one batch here, or all of them in processes of their own."""
    if config.probe is not None:
        return describe(config) if config.probe == 0 else probe(config)
    from qat.benchmark.probes import Probes, run_fresh
    from qat.reports.benchmark import results_of, write_report

    # This process never opens the device: some can be held by one process only.
    facts = run_fresh(words(replace(config, probe=0)), config.probe_seconds)
    say(facts["environment"]["device"])
    folder = config.output_dir or Path("runs") / f"benchmark_{facts['key']}"
    student = config.load_model or (config.save_model and str(config.save_model))
    config = replace(config, load_model=student, save_model=None)
    probes = Probes(
        folder=folder,
        identity=facts["identity"],
        words=lambda batch, checkpointing: words(
            replace(config, probe=batch, gradient_checkpointing=checkpointing)
        ),
        max_seconds=config.probe_seconds,
    )
    rows = [
        row for name in config.configurations for row in measure_all(config, probes, facts, name)
    ]
    results = results_of(rows, facts, is_search=config.find_max_batch)
    return write_report(folder, results, facts, command(config))


def measure_all(config: BenchmarkConfig, probes: Any, facts: Any, name: str) -> list[Any]:
    """Return the rows of one configuration, by batch."""
    from qat.benchmark.max_batch import batches_below, largest_batch
    from qat.benchmark.throughput import rates
    from qat.reports.benchmark import row_line

    rows: dict[int, dict[str, Any]] = {}

    def bytes_of(batch: int) -> int | None:
        row = probes.measure(name, batch)
        if row["status"] == "OK":
            row |= rates(row, seq_len=facts["identity"]["seq_len"], peak=facts["peak_flops"])
        rows[batch] = row
        say(row_line(row))
        return row.get("step_bytes")

    sizes = config.sizes
    if config.find_max_batch:
        largest = largest_batch(bytes_of, config.limit_bytes or facts["total_bytes"])
        sizes = batches_below(largest, list(rows), MOST_PROBES)
    for size in sizes:
        bytes_of(size)
    return [rows[batch] for batch in sorted(rows)]


def words(config: BenchmarkConfig) -> list[str]:
    """Return the command line, after python, that a process with these flags is started by."""
    return ["-m", *shlex.split(command(config, "qat benchmark").replace("\\\n", " "))]


def command(config: BenchmarkConfig, program: str = "python speedrun/benchmark.py") -> str:
    """Return the command as it can be typed again."""
    from qat.reports.log import command_line

    defaults = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    return command_line(program, asdict(config), defaults)
