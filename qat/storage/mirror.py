"""A folder here and its copy at an address: pushed as a whole, brought back where it is lost.

.pushing/NAME   files of a push, until all of them are there
.pushing.json   comes next and declares the push whole: what is in .pushing gets its names, and
                whoever finds it first completes that
NAME            the folder's files, of one push whenever there is no .pushing.json

What a killed or cut push left is therefore never mixed with the push before it.
"""

import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from threading import Event, Thread
from typing import Any

import fsspec

from qat.storage import download
from qat.storage.addresses import as_address
from qat.storage.decode import as_type, read_as, reading
from qat.storage.files import (
    MOST_JSON_BYTES,
    canonical_json,
    fingerprint,
    parse_json,
    write_json,
)
from qat.storage.receipt import Stamp, stamp
from qat.storage.stores import copy_files, place_folder

LOGGER = logging.getLogger("qat")
PUSHING, JOURNAL = ".pushing", ".pushing.json"
REMEDY = "remove it"
PUSH_SECONDS = 60  # between pushes of `pushing`
REFUSALS = (PermissionError, FileNotFoundError, ValueError)  # trying again would not help


@dataclass(frozen=True, slots=True)
class Push:
    """What a push that is whole still has to do."""

    put: list[str]
    removed: list[str]


@dataclass(frozen=True, slots=True)
class Pushed:
    """What of a folder lies at an address, as this machine knows."""

    address: str
    files: dict[str, Stamp]
    """As they were here when they were pushed or brought."""


class Mirror:
    """The copy of a folder at an address, or in a folder such as a mounted drive."""

    def __init__(self, folder: Path, place: str | Path):
        """Join a folder and where its copy goes; nothing is opened yet.

        Raises:
            ValueError: If the place is a web server, which takes nothing.
        """
        self.folder = Path(folder)
        self.address = as_address(place) or Path(place).absolute().as_posix()
        if download.is_web(self.address):
            raise ValueError(f"{self.address} can only be read; give a bucket or a folder")
        name = f".{self.folder.name}.{fingerprint(self.address)}.json"
        self.receipt = self.folder.with_name(name)

    def push(self, files: Mapping[str, Path]) -> list[str]:
        """Make the copy hold these files, by name; return the names of those that it lacked.

        Of what is there and not among them, what an earlier push put there goes.

        Raises:
            OSError: If the address cannot be reached, or takes nothing.
        """
        return self.persist(lambda: self.push_once(files))

    def bring(self, is_newer: Callable[[Collection[str], Collection[str]], bool]) -> bool:
        """Replace the folder by its copy where that is newer; return whether it was.

        Args:
            is_newer: Whether the copy, by the names of its files, is newer than the folder, by
                those of its own.

        Raises:
            OSError: If the address cannot be reached, or the disk is too small.
        """

        def names_there() -> list[str]:
            self.complete()
            return sorted(self.listing())

        there = self.persist(names_there)
        here = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*")]
        if not there or (here and not is_newer(there, here)):
            return False
        LOGGER.info(f"{self.folder} is older than {self.address}, or absent: fetching that")
        staging = self.folder.with_name(f".{self.folder.name}.fetching")
        copy_files(self.address, staging, ())
        place_folder(staging / PurePosixPath(self.address).name, self.folder)
        shutil.rmtree(staging, ignore_errors=True)
        self.write_receipt({name: stamp(self.folder / name) for name in there})
        return True

    def persist(self, act: Callable[[], Any]) -> Any:
        """Return what a call gives that may be repeated until the connection holds."""
        tries = 0
        while True:
            try:
                with download.reaching(self.address):
                    return act()
            except REFUSALS:
                raise
            except OSError:
                tries += 1
                if tries == download.TRIES:
                    raise
                time.sleep(download.WAIT_SECONDS * tries)

    def push_once(self, files: Mapping[str, Path]) -> list[str]:
        """Push without a second try."""
        self.complete()
        there, known = self.listing(), self.pushed_files()
        stamps = {name: stamp(path) for name, path in files.items()}
        lacking = [
            name
            for name, now in stamps.items()
            if known.get(name) != now or there.get(name) != now[0]
        ]
        gone = sorted(name for name in known if name not in files and name in there)
        if lacking or gone:
            system, root = self.open()
            targets = [f"{root}/{PUSHING}/{name}" for name in lacking]
            if lacking:
                system.put([str(files[name]) for name in lacking], targets)
            journal = canonical_json(asdict(Push(lacking, gone)))
            system.pipe_file(f"{root}/{JOURNAL}", journal.encode())
            self.complete()
        self.write_receipt(stamps)
        return lacking

    def complete(self) -> None:
        """Give what a whole push brought its names, and remove what is left of one that was cut."""
        system, root = self.open()
        staged = self.names(system, f"{root}/{PUSHING}")
        if system.exists(f"{root}/{JOURNAL}"):
            where = f"{self.address}/{JOURNAL}"
            if (num_bytes := system.size(f"{root}/{JOURNAL}")) > MOST_JSON_BYTES:
                raise ValueError(f"{where} has {num_bytes:,} bytes, too many for JSON; {REMEDY}")
            text = system.cat_file(f"{root}/{JOURNAL}")
            with reading(where, REMEDY):
                values = parse_json(text)
            push = as_type(values, Push, where, remedy=REMEDY)
            for name in push.put:
                if name in staged:  # else an earlier call has moved it
                    system.mv(f"{root}/{PUSHING}/{name}", f"{root}/{name}")
            there = self.names(system, root)
            if gone := [f"{root}/{name}" for name in push.removed if name in there]:
                system.rm(gone)
            system.rm_file(f"{root}/{JOURNAL}")
        if system.exists(f"{root}/{PUSHING}"):
            system.rm(f"{root}/{PUSHING}", recursive=True)

    def listing(self) -> dict[str, int]:
        """Return the sizes of the copy's files by name."""
        system, root = self.open()
        sizes = self.names(system, root)
        return {name: size for name, size in sizes.items() if not name.startswith(f"{PUSHING}/")}

    @staticmethod
    def names(system: fsspec.AbstractFileSystem, root: str) -> dict[str, int]:
        """Return the sizes of the files below a path by name; empty where there is none."""
        try:
            found = system.find(root, detail=True)
        except FileNotFoundError:
            return {}
        return {
            path[len(root) :].lstrip("/"): info["size"]
            for path, info in found.items()
            if info["type"] == "file"
        }

    def open(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """Return the file system, which remembers nothing of what others may change, and a path."""
        system, root = download.open_files(self.address)
        if "file" in system.protocol:
            system = fsspec.filesystem("file", auto_mkdir=True)
        system.invalidate_cache()
        return system, root.rstrip("/")

    def pushed_files(self) -> dict[str, Stamp]:
        """Return the files that this machine knows to be there, as they were here."""
        if not self.receipt.is_file():
            return {}
        return read_as(self.receipt, Pushed, remedy=REMEDY).files

    def write_receipt(self, stamps: dict[str, Stamp]) -> None:
        """Write down what is there."""
        write_json(self.receipt, asdict(Pushed(self.address, stamps)))


def files_of(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by name; hidden ones serve this machine alone."""
    found = {path.relative_to(folder): path for path in sorted(Path(folder).rglob("*"))}
    return {
        name.as_posix(): path
        for name, path in found.items()
        if path.is_file() and not any(part.startswith(".") for part in name.parts)
    }


@contextmanager
def pushing(mirror: Mirror) -> Iterator[None]:
    """Push a folder once in a while, in which files appear whole; if one fails, it is said."""
    ended = Event()

    def work() -> None:
        while not ended.wait(PUSH_SECONDS):
            try:
                mirror.push(files_of(mirror.folder))
            except OSError as error:
                LOGGER.warning(f"not copied yet: {error}")

    thread = Thread(target=work, daemon=True, name="push")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
