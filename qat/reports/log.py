"""The speedrun log: an entry a run, its numbers from the run's own record, a table of all on top.

Entries keep their numbers in a comment of one line of JSON, so that the table follows from the log
itself, also where the runs are not.
"""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from qat.reports.compare import Run, Table, final, markdown_table, numbers_of, show
from qat.storage.decode import as_type, reading
from qat.storage.files import parse_json
from qat.tracking.record import KL_NAMES

RUNS_TITLE = "## Run History"
TABLE_START, TABLE_END = "<!-- records: `qat log-run` writes this table -->", "<!-- /records -->"
EMPTY_LOG = f"""# Speedrun Log

Runs with what they were for, how they were started and what came out.

## Records

{TABLE_START}
{TABLE_END}

In bold: the smallest KL of a cache. kl_nats is over the whole vocabulary; kl_nats_lower, from a
cache that keeps a part of it, lies below. Numbers of different caches are not comparable.

{RUNS_TITLE}
"""
NAME = re.compile(r"[\w.-]+")
ENTRY = re.compile(r"^### \d{4}-\d{2}-\d{2}: (?P<name>\S+)", re.MULTILINE)
FACTS = re.compile(r"^<!-- run: (?P<facts>\{.*\}) -->$", re.MULTILINE)
CURVES = {  # what a run tells of itself, as the log calls it
    "eval/kd_loss": "kd_loss",
    "eval/kl_nats": "kl_nats (held-out)",
    "eval/kl_nats_lower": "kl_nats_lower (held-out)",
    "eval/perplexity": "perplexity",
    "train/loss": "training loss",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LogRunConfig:
    """Write a run into the speedrun log: an entry from its record, its loss plot, the table."""

    run: Positional[Path]
    """The run's folder, or that of a student that init-student or a conversion made."""
    name: str
    """Name of the entry, such as SR-010; an entry of that name and this run is written anew."""
    goal: str
    """What the run was for, in one line."""
    log: Path = Path("speedrun/log.md")
    """The log; plots go into `plots` next to it."""
    instance: str | None = None
    """Where it ran, such as "Colab T4"; what the run recorded when not given."""
    notes: tuple[str, ...] = ()
    """Observations, one a note."""

    def __post_init__(self) -> None:
        """Refuse names that no heading, link and file can hold."""
        if not NAME.fullmatch(self.name):
            raise ValueError(f"--name {self.name!r} has other signs than letters, digits, . _ -")
        if not self.goal.strip() or "\n" in self.goal:
            raise ValueError("--goal must be one line; say what the run was for")


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What an entry is written from."""

    run: Run
    sessions: list[dict[str, Any]]
    """As `environment.json` has them."""
    header: dict[str, Any]
    """Of the student that the run made, as `checkpoint.json` has it; empty where unknown."""
    command: str | None
    """As it can be typed again."""
    date: str
    """Year, month and day."""


def command_line(program: str, flags: dict[str, Any], defaults: dict[str, Any]) -> str:
    """Return a command as typed, a flag a line: those that are not as they are by default.

    Flags and defaults are fields as JSON has them; those without a default are always written.
    """
    parts = [program]
    for name, value in flags.items():
        if name in defaults and value == defaults[name]:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            parts.append(f"--{flag} {shlex.join(str(item) for item in values)}")
    return " \\\n    ".join(parts)


def run_name(run: Run, header: dict[str, Any]) -> str:
    """Return {format}_{preset}_{mlp|e2e}_{loss}_{fp32|fp16}, parts left out that are unknown."""
    plan = header.get("plan", {})
    loss = best(run, "eval/kd_loss")
    is_trained = bool(run.rows)
    parts = [
        "v2",
        plan.get("name"),
        ("mlp" if run.config.get("layers") == "mlp" else "e2e") if is_trained else "init",
        None if loss is None else f"{loss:.2f}",
        stored_name(header) if header else None,
    ]
    return "_".join(part for part in parts if part)


def stored_name(header: dict[str, Any]) -> str:
    """Return fp32 where a format stores float32 numbers, else fp16."""
    from qat.quant.plan import kind_specs

    specs = [spec for spec in kind_specs(header["plan"]).values() if spec is not None]
    return "fp32" if any(spec.stored_dtype == "float32" for spec in specs) else "fp16"


def best(run: Run, key: str) -> float | None:
    """Return the smallest value of a curve, else what the summary says."""
    series = [value for _, value in run.series(key)]
    return min(series) if series else run.summary.get(key.split("/")[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class LogRecord:
    """What an entry keeps of its run for the table; None where the run does not tell."""

    name: str
    date: str
    run: str
    instance: str
    cache: str | None
    identity: str | None
    steps: int | float | None
    seconds: int | float | None
    tokens_per_second: int | float | None
    kl_nats: int | float | None = None
    kl_nats_lower: int | float | None = None
    kd_loss: int | float | None
    perplexity: int | float | None
    bits: int | float | None


def record_of(facts: Facts, name: str, instance: str) -> dict[str, Any]:
    """Return the row of the table that a run gives, as JSON holds it."""
    numbers = numbers_of(facts.run)
    run, header = facts.run, facts.header
    return {
        "name": name,
        "date": facts.date,
        "run": run_name(run, header),
        "instance": instance,
        "cache": header.get("cache_fingerprint"),
        "identity": header.get("sha256"),
        "steps": numbers["steps"],
        "seconds": numbers["seconds"] or run.summary.get("seconds"),
        "tokens_per_second": numbers["tokens_per_second"] or run.summary.get("tokens_per_second"),
        **{name: best(run, f"eval/{name}") for name in KL_NAMES},
        "kd_loss": best(run, "eval/kd_loss"),
        "perplexity": best(run, "eval/perplexity"),
        "bits": header.get("metrics", {}).get("bits_per_weight_mlp")
        or run.summary.get("bits_per_weight_mlp"),
    }


def entry_text(facts: Facts, config: LogRunConfig, plot: str | None) -> str:
    """Return a run's entry in the log's form; `plot` is a link, None where there are no curves."""
    instance = config.instance or instance_of(facts.sessions)
    record = record_of(facts, config.name, instance)
    last_step = max(facts.run.rows, default=0)
    parts = [
        f"### {facts.date}: {config.name} - {record['run']}",
        f"**Goal**: {config.goal}",
        f"**Instance**: {instance}",
        "**Config**:\n" + "\n".join(f"- {line}" for line in config_lines(facts)),
    ]
    if facts.command:
        parts.append(f"**Command**:\n```bash\n{facts.command}\n```")
    parts += [
        f"**Result**: {'COMPLETE' if facts.run.summary else f'STOPPED at step {last_step}'}",
        markdown_table(result_table(facts.run)),
        *([f"![{config.name}]({plot})"] if plot else []),
        "**Notes**:\n" + "\n".join(f"- {note}" for note in config.notes or ("none",)),
        f"<!-- run: {json.dumps(record, sort_keys=True)} -->",
    ]
    return "\n\n".join(parts) + "\n"


def instance_of(sessions: Sequence[dict[str, Any]]) -> str:
    """Return where a run ran: device and machine of each session, equal ones once."""
    told = dict.fromkeys(f"{one['device']}; {one['machine']}" for one in sessions)
    return "; then ".join(told) or "not recorded"


def config_lines(facts: Facts) -> list[str]:
    """Return the lines of an entry that say what was run."""
    flags, header = facts.run.config, facts.header
    base = header.get("base_model", {}).get("name")
    lines = [
        f"Model: {base}, plan {header['plan']['name']}" if header else "Model: not recorded",
        f"Cache: {flags.get('cache_dir') or 'see fingerprint'} ({header.get('cache_fingerprint')})",
    ]
    if "max_steps" in flags:
        lr, schedule = flags.get("optim.lr"), flags.get("optim.schedule")
        what = {"mlp": "MLP-only", "attention": "attention-only"}.get(flags.get("layers"))
        lines += [
            f"Checkpoint: `{flags.get('checkpoint')}`",
            f"Training: {what or 'end to end'}, {flags['max_steps']} steps",
            f"Batch: {flags.get('batch_size')}, LR: {lr} ({schedule})",
        ]
    elif "made_by" in header:
        made_by = header["made_by"]
        settings = json.dumps(made_by.get("settings", {}), sort_keys=True)
        lines.append(f"Made by: `qat {made_by.get('command')}` with {settings}")
    commits = dict.fromkeys(str(one["commit"]) for one in facts.sessions if one["commit"])
    return lines + ([f"Commit: {', '.join(commits)}"] if commits else [])


def result_table(run: Run) -> Table:
    """Return first, last and best of each number that a run tells."""
    numbers, rows = numbers_of(run), []
    for key, label in CURVES.items():
        series = [value for _, value in run.series(key)]
        if len(series) > 1:
            rows += [[f"Initial {label}", series[0]], [f"Final {label}", series[-1]]]
            rows += [[f"**Best {label}**", min(series)]]
            gain = series[0] - min(series)
            rows += [["Improvement", f"{gain:.4g} ({gain / series[0] if series[0] else 0:.0%})"]]
        elif (value := final(run, key)) is not None:
            rows.append([label, value])
    seconds = numbers["seconds"] or run.summary.get("seconds")
    rows += [["Time", clock(seconds)]] if seconds else []
    others = ("steps", "tokens", "tokens_per_second", "final_top1_agreement")
    others += ("bits_per_weight", "bits_per_weight_mlp", "bits_per_weight_model")
    rows += [[key, numbers[key]] for key in others if numbers[key] is not None]
    return Table(["Metric", "Value"], rows)


def clock(seconds: float | None) -> str:
    """Return a duration for people."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}min" if hours else f"{minutes}min {rest:02}s"


def add_entry(log: str, name: str, entry: str) -> str:
    """Return the log with an entry at the end of its runs, or in the place of one of its name.

    An entry of that name that was written by hand, or of another run, is refused.
    """
    start, end = find_runs(log)
    body = log[start:end]
    found = [match for match in ENTRY.finditer(body) if match["name"] == name]
    if not found:
        return f"{log[:start]}{body.rstrip()}\n\n{entry}\n{log[end:]}".rstrip() + "\n"
    first = found[0].start()
    after = ENTRY.search(body, found[0].end())
    previous = body[first : after.start() if after else len(body)]
    if not same_run(previous, entry):
        raise ValueError(f"--name {name} is in the log already, for another run; choose another")
    return (
        log[: start + first] + entry + "\n" + log[start + first + len(previous) :]
    ).rstrip() + "\n"


def same_run(previous: str, entry: str) -> bool:
    """Return whether two entries tell of the same run."""
    facts = [read_facts(text) for text in (previous, entry)]
    keys = ("identity", "date") if facts[1][0].get("identity") is None else ("identity",)
    return bool(facts[0]) and all(facts[0][0].get(key) == facts[1][0].get(key) for key in keys)


def find_runs(log: str) -> tuple[int, int]:
    """Return where the runs start and end in a log: the next heading of their level ends them."""
    start = log.find(f"\n{RUNS_TITLE}")
    if start < 0:
        return len(log), len(log)
    offset = start + 1
    is_code = False
    for line in log[offset:].splitlines(keepends=True):
        if line.startswith("```"):
            is_code = not is_code
        if offset > start + 1 and not is_code and line.startswith("## "):
            return start + 1, offset
        offset += len(line)
    return start + 1, len(log)


def read_facts(text: str) -> list[dict[str, Any]]:
    """Return the numbers that entries keep, in order.

    Raises:
        ValueError: If a comment that holds them was damaged.
    """
    found, remedy = [], "correct or remove that entry"
    for match in FACTS.finditer(text):
        with reading("an entry's `<!-- run: -->`", remedy):
            values = parse_json(match["facts"])
        found.append(asdict(as_type(values, LogRecord, "an entry's record", remedy=remedy)))
    return found


def with_table(log: str) -> str:
    """Return the log with the table of records as its entries give it."""
    if TABLE_START not in log:
        title, _, rest = log.partition("\n")
        log = f"{title}\n\n## Records\n\n{TABLE_START}\n{TABLE_END}\n{rest}"
    table = records_table(read_facts(log))
    before, _, rest = log.partition(TABLE_START)
    _, _, after = rest.partition(TABLE_END)
    return f"{before}{TABLE_START}\n{markdown_table(table)}\n{TABLE_END}{after}"


def records_table(records: Sequence[dict[str, Any]]) -> Table:
    """Return a row a run, the smallest KL of each cache in bold."""
    header = ["Name", "Run", "Date", "Instance", "Steps", "Time", "tokens/s"]
    header += [*KL_NAMES, "kd_loss", "perplexity", "bits in MLP"]

    def kl_cell(one: dict[str, Any], name: str) -> Any:
        known = [r[name] for r in records if r["cache"] == one["cache"] and r.get(name) is not None]
        value = one.get(name)
        return f"**{show(value)}**" if known and value == min(known) else value

    rows = [
        [
            *(one["name"], one["run"], one["date"], one["instance"], one["steps"]),
            *(clock(one["seconds"]), one["tokens_per_second"]),
            *(kl_cell(one, name) for name in KL_NAMES),
            *(one["kd_loss"], one["perplexity"], one["bits"]),
        ]
        for one in records
    ]
    return Table(header, rows)
