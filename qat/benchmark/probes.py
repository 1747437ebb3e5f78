"""Probes in processes of their own, each result a file, so that a search can be stopped.

A process gives all its memory back whatever happened in it, and one that is killed harms no other.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from qat.runtime.device import says_out_of_memory
from qat.storage.decode import Size, as_type, read_as
from qat.storage.files import fingerprint, write_json

SCRATCH = ".probe."
# Of a process's messages: an error is at their end, before some 30 lines of torchrun's own.
TAIL_LINES = 60
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
KILLED_BY_TORCHRUN = "Signal 9 (SIGKILL) received"  # in what it says of a process
REMEDY = "remove it, and it is measured again"
Seconds = Annotated[float, msgspec.Meta(ge=1e-9, le=1e9)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What the file of a probe holds."""

    identity: dict[str, Any]
    row: dict[str, Any]
    """Fields of `Fitting` or `TooLarge`, as its status says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitting:
    """What a batch costs that fits into memory."""

    configuration: str
    batch: Size
    status: Literal["OK"]
    warm_up_seconds: Seconds
    seconds: Annotated[list[Seconds], msgspec.Meta(min_length=1)]
    """Of each step that counts."""
    step_seconds: Seconds
    """Their median."""
    step_bytes: Size
    peak_bytes: Size
    loss: float | None
    flops_per_token: Size

    def __post_init__(self) -> None:
        """Refuse a median of other numbers."""
        if not min(self.seconds) <= self.step_seconds <= max(self.seconds):
            raise ValueError(f"step_seconds {self.step_seconds} is outside those of the steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class TooLarge:
    """Why a batch does not fit."""

    configuration: str
    batch: Size
    status: Literal["OOM"]
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Probes:
    """Measures batch sizes of one kind of training on one device, each once."""

    folder: Path
    """Where results lie."""
    identity: dict[str, Any]
    """All that decides a result but for batch and configuration."""
    arguments: Callable[[int, bool], Sequence[str]]
    """Command line, after python, for a batch size with or without gradient checkpointing."""
    max_seconds: float

    def measure(self, configuration: str, batch: int) -> dict[str, Any]:
        """Return the row of a batch size, from its file where it was measured before."""
        identity = {**self.identity, "configuration": configuration, "batch": batch}
        path = self.folder / "probes" / f"{configuration}_{batch}_{fingerprint(identity)}.json"
        if path.is_file():
            return read_row(path, identity)
        arguments = self.arguments(batch, configuration == "checkpointing")
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"{SCRATCH}*"):  # by a search that was killed
            shutil.rmtree(left)
        try:
            result = run_fresh(arguments, self.max_seconds, self.folder)
        except ValueError as error:
            raise ValueError(f"batch {batch} ({configuration}) failed: {error}") from error
        row = {"configuration": configuration, "batch": batch, **result}
        write_json(path, {"identity": identity, "row": row})
        return row


def read_row(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the row that the file of a probe keeps.

    Raises:
        ValueError: If it is no such row, or one of another measurement.
    """
    kept = read_as(path, Probe, remedy=REMEDY)
    kind = Fitting if kept.row.get("status") == "OK" else TooLarge
    row = as_type(kept.row, kind, path, remedy=REMEDY)
    if {**kept.identity, "configuration": row.configuration, "batch": row.batch} != identity:
        raise ValueError(f"{path} is of another measurement; {REMEDY}")
    return kept.row


def run_fresh(
    arguments: Sequence[str], max_seconds: float | None = None, scratch: Path | None = None
) -> dict[str, Any]:
    """Return the closing values of a command in a process of its own.

    They are "status" OOM and "why" where memory was too small.

    Args:
        arguments: Command line, after python.
        max_seconds: Longest that it may take; without end when not given.
        scratch: Folder for its temporary files, which are removed also where it was killed.

    Raises:
        ValueError: If it failed otherwise, with the last line of its messages.
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix=SCRATCH) as temporary:
        try:
            done = subprocess.run(
                [sys.executable, *arguments],
                capture_output=True,
                text=True,
                timeout=max_seconds,
                env={**os.environ, "TMPDIR": temporary},
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"no end in {max_seconds:g} s; raise --probe-seconds") from error
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = [line.strip() for line in done.stderr.splitlines() if line.strip()][-TAIL_LINES:]
    if done.returncode in KILLED or any(KILLED_BY_TORCHRUN in line for line in last):
        return {"status": "OOM", "why": "killed by the system"}
    if says_out_of_memory("\n".join(last)):
        why = next(line for line in reversed(last) if says_out_of_memory(line))
        return {"status": "OOM", "why": why}
    told = [line for line in last if line.startswith("error: ")] or last
    message = told[-1] if told else f"exit code {done.returncode}"
    raise ValueError(message.removeprefix("error: "))
