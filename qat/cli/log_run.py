"""`qat log-run`: a run's entry in the speedrun log, its plot beside it, the table on top."""

from collections.abc import Sequence
from dataclasses import MISSING, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qat.cli.command import run_command
from qat.reports.log import Facts, LogRunConfig
from qat.tracking.messages import say

HEADER = "checkpoint.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat log-run", LogRunConfig, log_run, argv)


def log_run(config: LogRunConfig) -> dict[str, Any]:
    """Read the run's record, write entry, plot and table; return the closing values."""
    from qat.reports.compare import plot_curves
    from qat.reports.log import EMPTY_LOG, add_entry, entry_text, with_table
    from qat.storage.files import write_text

    facts = read_run_facts(config.run)
    log = config.log.read_text(encoding="utf-8") if config.log.is_file() else EMPTY_LOG
    plot = Path("plots") / f"{config.name}.png"
    has_curves = any(len(row) > 1 for row in facts.run.rows.values())
    entry = entry_text(facts, config, plot.as_posix() if has_curves else None)
    log = with_table(add_entry(log, config.name, entry))
    drawn = plot_curves([facts.run], config.log.parent / plot)
    write_text(config.log, log)
    say(entry)
    return {
        "log": str(config.log),
        "name": config.name,
        "run": entry.splitlines()[0].rpartition(" - ")[2],
        "plot": str(drawn) if drawn else None,
    }


def read_run_facts(folder: Path) -> Facts:
    """Return what a run's folder tells.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no record.
    """
    from qat.reports.compare import read_runs
    from qat.storage.files import read_json
    from qat.tracking.environment import read_sessions

    (run,), _ = read_runs([folder])
    headers = [folder / name / HEADER for name in ("best", "", "final")]
    header = next((read_json(path) for path in headers if path.is_file()), {})
    sessions = read_sessions(folder)
    first = (
        datetime.fromtimestamp((folder / "summary.json").stat().st_mtime, UTC)
        if (folder / "summary.json").is_file()
        else datetime.now(UTC)
    )
    date = sessions[0]["started"][:10] if sessions else f"{first:%Y-%m-%d}"
    command = train_command(run.config) if "v2_checkpoint" in run.config else None
    return Facts(run=run, sessions=sessions, header=header, command=command, date=date)


def train_command(flags: dict[str, Any]) -> str:
    """Return the training command that a run's config.json stands for."""
    from qat.reports.log import command_line
    from qat.train.config import TrainConfig

    known = {field.name: field for field in fields(TrainConfig)}
    defaults = {
        name: list(field.default) if isinstance(field.default, tuple) else field.default
        for name, field in known.items()
        if field.default is not MISSING
    }
    given = {name: flags[name] for name in known if name in flags}
    return command_line("python scripts/train_v2_simple.py", given, defaults)


if __name__ == "__main__":
    raise SystemExit(main())
