"""Copies of a run's folder elsewhere, made at each interval while training goes on."""

import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

from qat.runtime.launch import is_first
from qat.storage.addresses import as_address, working_folder
from qat.storage.mirror import Mirror, files_of
from qat.tracking.record import SUMMARY
from qat.tracking.sinks import TENSORBOARD
from qat.train.state import POSITION, STATE

LOGGER = logging.getLogger("qat")
RUNS = "runs"  # where the folders of runs are whose output goes to an address
SNAPSHOT = ".copies.part"  # `sweep_leftovers` removes what a kill leaves of it
APPENDED = (TENSORBOARD, "wandb")  # folders whose files grow; those of all others are replaced


class RunCopies:
    """Where a run is copied to: the address of its output, with its states, and another place."""

    def __init__(self, output: Path, copy_to: Path | None = None):
        """Tell the folder of the run here, and open nothing.

        Args:
            output: The folder, or the address that it is a working copy of.
            copy_to: Folder or address of the results alone.
        """
        address = as_address(output)
        self.folder = output if address is None else working_folder(address, RUNS)
        self.home = None if address is None else Mirror(self.folder, address)
        self.results = None if copy_to is None else Mirror(self.folder, copy_to)

    @property
    def places(self) -> str:
        """Return where copies go, empty where nowhere."""
        return ", ".join(one.address for one in (self.home, self.results) if one)

    def bring(self) -> None:
        """Take up what lies at the output's address where the folder here is behind, or gone.

        Raises:
            OSError: If the address cannot be reached.
        """
        if self.home:
            self.home.bring(lambda there, here: how_far(there) > how_far(here))

    def push(self) -> None:
        """Copy the folder as it is; nothing may write there meanwhile.

        Raises:
            OSError: If a place cannot be reached; the folder here stays.
        """
        if self.places and is_first():
            self.push_files(files_of(self.folder))

    def begin(self) -> Callable[[], None] | None:
        """Take a snapshot of the folder but for its states; return what adds those and copies it.

        Call that when the state being saved is whole: training goes on in between. Where a place
        cannot be reached it says so, and the next interval tries again.
        """
        if not self.places or not is_first():
            return None
        taken = take_snapshot(self.folder)
        return partial(self.push_snapshot, taken)

    def push_snapshot(self, taken: Mapping[str, Path]) -> None:
        """Copy a snapshot and the states that are whole."""
        states = {name: path for name, path in files_of(self.folder).items() if is_state(name)}
        try:
            self.push_files({**taken, **states})
        except OSError as error:
            LOGGER.warning(f"no copy is made of this interval: {error}")
        finally:
            shutil.rmtree(self.folder / SNAPSHOT, ignore_errors=True)

    def push_files(self, files: Mapping[str, Path]) -> None:
        """Copy files by name to each place."""
        if self.home:
            self.home.push(files)
        if self.results:
            self.results.push({name: path for name, path in files.items() if not is_state(name)})


def how_far(names: Collection[str]) -> tuple[bool, str]:
    """Return what grows with a run, of the names of its files: its end, its last whole state."""
    states = [name for name in names if is_state(name) and name.endswith(f"/{POSITION}")]
    return SUMMARY in names, max(states, default="")


def is_state(name: str) -> bool:
    """Whether a file of a run only serves to resume it."""
    return name.startswith(f"{STATE}/")


def take_snapshot(folder: Path) -> dict[str, Path]:
    """Return a run's files as they are now, but for states; later writes do not change them.

    Files of students are replaced and never written to, so that a second name holds their content.
    """
    snapshot = folder / SNAPSHOT
    shutil.rmtree(snapshot, ignore_errors=True)
    taken = {}
    for name, path in files_of(folder).items():
        if is_state(name):
            continue
        taken[name] = snapshot / name
        taken[name].parent.mkdir(parents=True, exist_ok=True)
        try:
            if "/" not in name or name.startswith(APPENDED):
                shutil.copy2(path, taken[name])
            else:
                os.link(path, taken[name])
        except OSError:  # a file system without links
            shutil.copy2(path, taken[name])
    return taken
