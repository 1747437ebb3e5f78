"""A run's folder: config.json, metrics.jsonl (one row a step and kind) and summary.json."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.storage.files import read_json, write_json, write_text

CONFIG = "config.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"


class RunRecord:
    """Writes what happens in a run, so that a killed process loses at most one line."""

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        """Open the folder for writing.

        Args:
            folder: Made where absent.
            resume_step: The last step that the restored state holds; later rows are dropped,
                as they will be written again. None starts over.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None else read_rows(self.folder)
        kept = [row for row in kept if row["step"] <= (resume_step or 0)]
        write_text(self.folder / METRICS, "".join(json.dumps(row) + "\n" for row in kept))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row; a number that is not finite becomes null."""
        row = {"step": step} | {key: json_number(value) for key, value in values.items()}
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write what the run was asked for."""
        write_json(self.folder / CONFIG, dict(config))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write how the run ended; its presence says that it did."""
        write_json(self.folder / SUMMARY, dict(summary))


def json_number(value: float) -> float | int | None:
    """Return a number that JSON can hold; one-element tensors count as numbers."""
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl in order; empty where there is none.

    A last line that a killed process left half written is left out.

    Raises:
        ValueError: If an earlier line is not JSON.
    """
    path = Path(folder) / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is not JSON; remove that line") from error
    return rows


def read_config(folder: Path) -> dict[str, Any]:
    """Return what the run was asked for; empty where it was not written."""
    return read_if_present(Path(folder) / CONFIG)


def read_summary(folder: Path) -> dict[str, Any]:
    """Return how the run ended; empty where it has not."""
    return read_if_present(Path(folder) / SUMMARY)


def read_if_present(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file, empty where there is none."""
    return read_json(path) if path.is_file() else {}
