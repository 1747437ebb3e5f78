"""What training runs of every kind share: a folder of their own, one tracker, a look without steps.

Of several processes the first one locks, tracks and copies.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qat.evaluate.kl import Numbers
from qat.runtime.device import Device, seeded
from qat.runtime.distributed import from_first, joined
from qat.runtime.launch import is_first, rank
from qat.storage.files import folder_lock, sweep_leftovers
from qat.tracking.messages import say
from qat.tracking.sinks import Tracker, open_tracker
from qat.train import run_folder
from qat.train.config import TrackingConfig, TrainConfig
from qat.train.copies import RunCopies
from qat.train.dense_config import DenseConfig
from qat.train.state import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredResult:
    """What --eval-only measures."""

    checkpoint: str
    """Folder of the model."""
    numbers: Numbers
    """Held-out numbers by the names that a run records, and NAME/perplexity of each text."""


@contextmanager
def held_folder(
    config: TrainConfig | DenseConfig, identity: dict[str, Any], device: Device, copies: RunCopies
) -> Iterator[dict[str, Any] | None]:
    """Hold a run's folder for its processes; give the summary of a run that has ended in it.

    What lies elsewhere of it is brought before, and copied there at the end.

    Raises:
        ValueError: If the folder holds another run or something else, or is in use.
        OSError: If a place of copies cannot be reached.
    """
    folder = config.output_dir
    run_folder.finished_run(folder, identity)  # refuse before the folder is touched
    lock = folder_lock(folder) if is_first() else nullcontext()
    # Dropout of each process has draws of its own.
    seed = seeded(device.torch_device, config.seed + rank())
    with joined(device), lock, seed:
        summary = from_first(partial(look_up, folder, identity, copies))
        if summary is not None:
            say(f"{folder} is already complete: nothing to do")
        yield summary
        copies.push()
        if copies.places:
            say(f"copied to {copies.places}")


def look_up(folder: Path, identity: dict[str, Any], copies: RunCopies) -> dict[str, Any] | None:
    """Return the summary of a run that has ended, in its folder, freed of what a kill left."""
    copies.bring()
    sweep_leftovers(folder)
    return run_folder.finished_run(folder, identity)


def open_run_tracker(
    folder: Path, tracking: TrackingConfig, record: dict[str, Any], progress: Progress
) -> Tracker:
    """Return what sends a run's numbers, of several processes in the first."""
    if not is_first():
        return Tracker([])
    resume_step = progress.step or None
    return open_tracker(folder, record, resume_step=resume_step, **tracking.sinks())
