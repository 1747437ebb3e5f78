"""Write a run into the speedrun log: an entry from the run's record, its plot, the table."""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qat.model.checkpoint import read_header
from qat.reports.compare import flat_settings, plot_curves, read_runs
from qat.reports.log import (
    EMPTY_LOG,
    Facts,
    LogRunConfig,
    add_entry,
    command_line,
    entry_text,
    with_table,
)
from qat.storage.decode import naming, reading
from qat.storage.files import write_text
from qat.tracking.environment import read_sessions
from qat.tracking.messages import say
from qat.tracking.record import SUMMARY, config_as_json
from qat.train.config import TrainConfig

HEADER = "checkpoint.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class LogRunResult:
    """Where the entry is."""

    log: str
    """The log."""
    name: str
    """Name of the entry."""
    run: str
    """Name of the run: format, preset, what trained, loss, precision."""
    plot: str | None
    """Its loss plot; None where the run has no curves."""


def log_run(config: LogRunConfig) -> LogRunResult:
    """Read a run's record; write its entry, its plot and the table of all runs."""
    facts, log = read_run_facts(config.run), EMPTY_LOG
    if config.log.is_file():
        with reading(config.log, "correct it, or name another --log"):
            log = config.log.read_text(encoding="utf-8")
    plot = Path("plots") / f"{config.name}.png"
    has_curves = any(len(row) > 1 for row in facts.run.rows.values())
    entry = entry_text(facts, config, plot.as_posix() if has_curves else None)
    with naming(config.log):
        log = with_table(add_entry(log, config.name, entry))
    drawn = plot_curves([facts.run], config.log.parent / plot)
    write_text(config.log, log)
    say(entry)
    return LogRunResult(
        log=str(config.log),
        name=config.name,
        run=entry.splitlines()[0].rpartition(" - ")[2],
        plot=str(drawn) if drawn else None,
    )


def read_run_facts(folder: Path) -> Facts:
    """Return what a run's folder records."""
    (run,), _ = read_runs([folder])
    headers = [folder / name / HEADER for name in ("best", "", "final")]
    header = next((asdict(read_header(at.parent)) for at in headers if at.is_file()), {})
    sessions = read_sessions(folder)
    summary = folder / SUMMARY
    seconds = summary.stat().st_mtime if summary.is_file() else datetime.now(UTC).timestamp()
    ended = datetime.fromtimestamp(seconds, UTC)
    date = sessions[0]["started"][:10] if sessions else f"{ended:%Y-%m-%d}"
    command = train_command(run.config) if "max_steps" in run.config else None
    return Facts(run=run, sessions=sessions, header=header, command=command, date=date)


def train_command(flags: dict[str, Any]) -> str:
    """Return the training command that a run's config.json stands for."""
    required = ("checkpoint", "cache_dir", "output_dir")
    usual = TrainConfig(**dict.fromkeys(required, Path()))
    known = flat_settings(config_as_json(usual))
    defaults = {name: value for name, value in known.items() if name not in required}
    given = {name: flags[name] for name in known if name in flags}
    return command_line("qat train", given, defaults)
