"""Find the largest batch that fits and the fastest one, each measured in a fresh process."""

import shlex
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from qat.benchmark.config import BenchmarkConfig
from qat.benchmark.max_batch import batches_below, largest_batch
from qat.benchmark.probes import Probes, run_fresh
from qat.benchmark.throughput import rates
from qat.pipelines.batch_probe import describe, probe
from qat.reports.benchmark import results_of, row_line, write_report
from qat.reports.log import command_line
from qat.runtime.launch import num_processes
from qat.storage.files import folder_lock
from qat.tracking.messages import say

MOST_PROBES = 8  # of a search; where it ends sooner, smaller batches are timed as well


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkResult:
    """The largest batch, the fastest one, and everything that was measured."""

    max_batch: int | None
    """Largest batch that fits; None where it was not searched."""
    best_batch: int
    """Batch with the most tokens a second."""
    tokens_per_second: float
    """Of that batch, by its median step."""
    tokens_per_second_spread: list[float]
    """By its slowest and its quickest step."""
    mfu: float | None
    """Its share of the chip's peak; None where that is not known."""
    peak_bytes: int
    """Most memory that its configuration held."""
    probes: int
    """Batches measured."""
    configurations: dict[str, Any]
    """The numbers above, with and without gradient checkpointing."""
    rows: list[dict[str, Any]]
    """One a measured batch."""
    device: str
    """Device and chip."""
    model: dict[str, Any]
    """Name and hash of the model."""
    cache: str | None
    """Fingerprint of the cache; None for random tokens."""
    dtype: str
    """Compute dtype."""
    seq_len: int
    """Tokens of a sequence."""
    mode: str
    """What trains: mlp or e2e."""
    steps: int
    """Timed steps of a batch."""
    memory_limit: float | None
    """GB that a batch may hold; None where only the device limits it."""
    versions: dict[str, str | None]
    """Of the packages that decide speed, and the commit."""
    plot: str
    """Throughput and memory against batch."""
    entry: str
    """An entry for the speedrun log."""


def benchmark(config: BenchmarkConfig) -> BenchmarkResult | dict[str, Any]:
    """Measure training steps by batch size; with `probe`, one batch size in this process."""
    if config.probe is not None:
        return describe(config) if config.probe == 0 else probe(config)
    if num_processes() > 1:
        raise ValueError(
            "`qat benchmark` has torchrun start the processes of each batch; call it without, with "
            f"--processes {num_processes()}"
        )
    # This process never opens the device: some can be held by one process only.
    facts = run_fresh(arguments(replace(config, probe=0)), config.probe_seconds)
    say(facts["environment"]["device"])
    folder = config.output_dir or Path("runs") / f"benchmark_{facts['key']}"
    student = config.load_model or (config.save_model and str(config.save_model))
    config = replace(config, load_model=student, save_model=None)
    probes = Probes(
        folder=folder,
        identity=facts["identity"],
        arguments=lambda batch, checkpointing: arguments(
            replace(config, probe=batch, gradient_checkpointing=checkpointing)
        ),
        max_seconds=config.probe_seconds,
    )
    with folder_lock(folder):
        rows = [
            row
            for name in config.configurations
            for row in measure_all(config, probes, facts, name)
        ]
        results = results_of(rows, facts, is_search=config.find_max_batch)
        return BenchmarkResult(**write_report(folder, results, facts, command(config)))


def measure_all(
    config: BenchmarkConfig, probes: Probes, facts: dict[str, Any], name: str
) -> list[dict[str, Any]]:
    """Return the rows of one configuration, by batch."""
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


def arguments(config: BenchmarkConfig) -> list[str]:
    """Return the command line, after python, that a process with these flags is started by."""
    own = as_arguments(command(config, "qat benchmark"))
    if config.processes == 1 or config.probe == 0:
        return own
    count = str(config.processes)
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, *own]


def as_arguments(command: str) -> list[str]:
    """Return a command of this package as the arguments of python."""
    return ["-m", *shlex.split(command.replace("\\\n", " "))]


def command(config: BenchmarkConfig, program: str = "python speedrun/benchmark.py") -> str:
    """Return the command as it can be typed again."""
    defaults = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    return command_line(program, asdict(config), defaults)
