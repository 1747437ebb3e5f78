"""Packing a cache or a run as one archive with its checksum."""

import time
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from qat.storage.archive import pack_folder
from qat.tracking.messages import say


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """Make one archive of a folder; `qat fetch` makes a folder of it again."""

    folder: Positional[Path]
    """A cache, a run, a checkpoint."""
    output: Path | None = None
    """The archive, ending in .tar.lz4 or .tgz; FOLDER.tar.lz4 when not given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackResult:
    """An archive that was written."""

    archive: str
    """Path or URL."""
    bytes: int
    sha256: str
    seconds: float


def pack(config: PackConfig) -> PackResult:
    """Write the archive of a folder."""
    from qat.cache.manifest import BUILDING_FILE

    started = time.perf_counter()
    folder = config.folder.resolve()
    if (folder / BUILDING_FILE).exists():
        raise ValueError(f"{config.folder} is not whole; run its `qat build-cache` again")
    archive = config.output or config.folder.parent / f"{folder.name}.tar.lz4"
    say(f"packing {config.folder} into {archive}")
    digest = pack_folder(config.folder, archive)
    return PackResult(
        archive=str(archive),
        bytes=archive.stat().st_size,
        sha256=digest,
        seconds=round(time.perf_counter() - started, 2),
    )
