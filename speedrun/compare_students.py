"""Compare two students and two runs number by number: what a change of the code left as it was.

Tensors of the students' files are compared to the bit, the losses of the runs' log lines by their
largest difference.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.cli.command import run_command


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """Compare two students, and the losses of two runs, number by number."""

    students: tuple[Path, Path]
    """Two native folders."""
    runs: tuple[Path, Path] | None = None
    """Two run folders."""


def compare(config: CompareConfig) -> dict[str, Any]:
    """Return how many tensors of two students differ, and by how much two runs' losses do."""
    from safetensors.torch import load_file
    from torch import equal

    first, second = (load_file(folder / "student.safetensors") for folder in config.students)
    differing = [
        name
        for name in sorted(first.keys() | second.keys())
        if name not in first or name not in second or not equal(first[name], second[name])
    ]
    found = {"tensors": len(first), "differing": len(differing), "first": differing[:3]}
    if config.runs is None:
        return found
    losses = [losses_of(folder) for folder in config.runs]
    gaps = [abs(a - b) for a, b in zip(*losses, strict=True)]
    return {**found, "losses": len(gaps), "largest_loss_difference": max(gaps)}


def losses_of(folder: Path) -> list[float]:
    """Return the training losses that a run logged, in order."""
    from qat.reports.compare import read_runs

    (run,), _ = read_runs([folder])
    return [value for _, value in run.series("train/loss")]


if __name__ == "__main__":
    raise SystemExit(run_command("python speedrun/compare_students.py", CompareConfig, compare))
