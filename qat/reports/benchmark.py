"""What a benchmark leaves: the seeds' table, a plot, an entry for the log, closing values."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qat.reports.compare import Table, markdown_table, save_figure
from qat.storage.files import write_text

MB = 10**6
TITLES = {"baseline": "no gradient checkpointing", "checkpointing": "gradient checkpointing"}


def results_of(
    rows: Sequence[dict[str, Any]], facts: dict[str, Any], *, is_search: bool
) -> dict[str, Any]:
    """Return closing values: the largest batch of a search, the fastest one, what each held.

    Rows are of all configurations, by batch in each. In a search the one after the largest that
    fits does not. Where not one batch fits, that is an error.
    """
    fitting = [row for row in rows if row["status"] == "OK"]
    if not fitting:
        raise ValueError(
            f"batch {min(row['batch'] for row in rows)} does not fit: {rows[0]['why']}; "
            "shorten --seq-len or raise --memory-limit"
        )
    names = list(dict.fromkeys(row["configuration"] for row in rows))
    each = {}
    for name in names:
        own = [row for row in fitting if row["configuration"] == name]
        largest = max((row["batch"] for row in own), default=0)
        each[name] = {
            "max_batch": largest if is_search else None,
            **summary(max(own, key=lambda row: row["tokens_per_second"], default=None)),
            "peak_bytes": max((row["peak_bytes"] for row in own), default=None),
        }
        for row in own:
            row["status"] = "MAX" if is_search and row["batch"] == largest else "OK"
    best = max(each.values(), key=lambda one: one["tokens_per_second"] or 0)
    return {
        **best,
        "max_batch": max(one["max_batch"] for one in each.values()) if is_search else None,
        "probes": len(rows),
        "configurations": each,
        "rows": list(rows),
        **facts["identity"],
    }


def summary(row: dict[str, Any] | None) -> dict[str, Any]:
    """Return what the fastest row tells; None where no batch fits."""
    names = ("tokens_per_second", "tokens_per_second_spread", "mfu")
    return {"best_batch": row and row["batch"], **{name: row and row[name] for name in names}}


def row_line(row: dict[str, Any]) -> str:
    """Return what a probe has measured, on one line."""
    told = f"batch {row['batch']} ({TITLES[row['configuration']]}): "
    if row["status"] == "OOM":
        return f"{told}does not fit, {row['why']}"
    return (
        f"{told}{row['step_seconds']:.3f} s a step, {row['tokens_per_second']:.0f} tokens/s, "
        f"{row['peak_bytes'] / MB:,.0f} MB, {row['warm_up_seconds']:.1f} s to warm up"
    )


def results_table(rows: Sequence[dict[str, Any]], *, compiles_steps: bool) -> Table:
    """Return the seeds' table, on a device that compiles with the seconds which that took."""
    header = ["Batch", "Step(s)", "Memory", "t/s", "Loss", "Status"]
    header[1:1] = ["Compile(s)"] if compiles_steps else []
    return Table(header, [cells(row, compiles_steps=compiles_steps) for row in rows])


def cells(row: dict[str, Any], *, compiles_steps: bool) -> list[str]:
    """Return a row's cells; what does not fit has none but its status."""
    if row["status"] == "OOM":
        return [str(row["batch"]), *["-"] * (5 if compiles_steps else 4), "OOM"]
    loss = "nan" if row["loss"] is None else f"{row['loss']:.2f}"
    return [
        str(row["batch"]),
        *([f"{row['warm_up_seconds']:.1f}"] if compiles_steps else []),
        f"{row['step_seconds']:.3f}",
        f"{row['peak_bytes'] / MB:,.0f}M",
        f"{row['tokens_per_second']:.0f}",
        loss,
        row["status"],
    ]


def write_report(
    folder: Path, results: dict[str, Any], facts: dict[str, Any], command: str
) -> dict[str, Any]:
    """Print the tables, write plot and entry; return the closing values with their paths."""
    tables = {
        name: results_table(
            [row for row in results["rows"] if row["configuration"] == name],
            compiles_steps=facts["compiles_steps"],
        )
        for name in results["configurations"]
    }
    for name, table in tables.items():
        show(table, TITLES[name])
    plot = draw(results["rows"], facts["identity"]["memory_limit"], folder / "benchmark.png")
    write_text(folder / "entry.md", entry_text(folder.name, results, tables, facts, command))
    return {**results, "plot": str(plot), "entry": str(folder / "entry.md")}


def show(table: Table, title: str) -> None:
    """Print a table for people."""
    from rich.console import Console
    from rich.table import Table as Shown

    shown = Shown(title=title)
    for column in table.header:
        shown.add_column(column, justify="right")
    for row in table.rows:
        shown.add_row(*row)
    Console(stderr=True).print(shown)


def entry_text(
    name: str,
    results: dict[str, Any],
    tables: dict[str, Table],
    facts: dict[str, Any],
    command: str,
) -> str:
    """Return the entry that the speedrun log takes as it is."""
    identity, environment = facts["identity"], facts["environment"]
    versions = ", ".join(f"{key} {value}" for key, value in identity["versions"].items())
    limit = identity["memory_limit"]
    trained = {"mlp": "MLP-only", "e2e": "end to end"}[identity["mode"]]
    parts = [
        f"### {environment['started'][:10]}: {name} - Performance Benchmark",
        "**Goal**: Find the batch size to train with",
        f"**Instance**: {facts['chip'] or environment['machine']}; {environment['device']}",
        "**Config**:\n"
        f"- Model: {identity['model']['name']}, training {trained}, {identity['dtype']}\n"
        f"- Sequences of {identity['seq_len']} tokens, cache {identity['cache'] or 'none'}\n"
        f"- Test: {identity['steps']} steps per batch size after the warm-up, one evaluation, "
        "one saved state, each size in a process of its own\n"
        f"- Memory limit: {f'{limit:g} GB' if limit else 'none but the device'}\n"
        f"- Versions: {versions}",
        f"**Command**:\n```bash\n{command}\n```",
        "**Result**: COMPLETE",
    ]
    for key, table in tables.items():
        parts += [f"With {TITLES[key]}:", markdown_table(table)]
    findings = [f"- {line}" for name in tables for line in finding(name, results)]
    parts += [f"![{name}](benchmark.png)", "**Key Findings**:\n" + "\n".join(findings)]
    return "\n\n".join(parts) + "\n"


def finding(name: str, results: dict[str, Any]) -> list[str]:
    """Return what a configuration's rows say."""
    one = results["configurations"][name]
    lines = []
    if one["max_batch"] is not None:
        lines.append(f"**Max batch size: {one['max_batch']}** with {TITLES[name]}")
    if one["best_batch"]:
        least, most = one["tokens_per_second_spread"]
        used = "" if one["mfu"] is None else f", {one['mfu']:.1%} of the chip's peak"
        lines.append(
            f"**Best throughput: {one['tokens_per_second']:.0f} t/s** ({least:.0f} to {most:.0f}) "
            f"at batch={one['best_batch']} with {TITLES[name]}{used}"
        )
    return lines


def draw(rows: Sequence[dict[str, Any]], memory_limit: float | None, path: Path) -> Path:
    """Draw throughput with its spread and memory against batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for name in dict.fromkeys(row["configuration"] for row in rows):
        own = [row for row in rows if row["configuration"] == name and row["status"] != "OOM"]
        batches = [row["batch"] for row in own]
        rates = [row["tokens_per_second"] for row in own]
        spreads = [row["tokens_per_second_spread"] for row in own]
        below = [rate - least for rate, (least, _) in zip(rates, spreads, strict=True)]
        above = [most - rate for rate, (_, most) in zip(rates, spreads, strict=True)]
        speed.errorbar(batches, rates, [below, above], marker="o", capsize=3, label=TITLES[name])
        memory.plot(batches, [row["peak_bytes"] / 1e9 for row in own], marker="o")
    for panel, label in ((speed, "tokens/s"), (memory, "peak memory (GB)")):
        panel.set_xlabel("batch (sequences)")
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    if memory_limit:
        memory.axhline(memory_limit, color="gray", linestyle="--")
    speed.legend()
    return save_figure(figure, path)
