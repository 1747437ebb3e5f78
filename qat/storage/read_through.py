"""Files of an address, copied here when they are first read; the least recently read make room."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from qat.storage import download
from qat.storage.addresses import working_folder
from qat.storage.files import folder_lock, sha256_of_file

COPIES = "caches/.copies"  # of all addresses, which share the room
SHARE_OF_DISK = 0.5  # of what is free, or taken by copies
PATIENCE_SECONDS = 3600  # for another process, which may copy a large file


class ReadThrough:
    """What lies at an address, read by way of copies here."""

    def __init__(self, address: str, *, most_bytes: int | None = None):
        """Name the address, and how much copies may take; half of the free disk when not given."""
        self.address, self.copies = address, Path(COPIES)
        self.folder = working_folder(address, COPIES)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.whole: set[str] = set()
        if most_bytes is None:
            room = shutil.disk_usage(self.folder).free + sum(size for _, size, _ in self.kept())
            most_bytes = int(SHARE_OF_DISK * room)
        self.most_bytes = most_bytes

    def path(self, name: str, sha256: str | None = None) -> Path:
        """Return where a file is here: of this checksum, or where none is known the present one.

        It may make room for others at a later call; what has it open or mapped keeps its content.

        Raises:
            FileNotFoundError: If the address has no such file.
            ArchiveMismatch: If its checksum is another one.
            OSError: If the address cannot be reached.
        """
        target = self.folder / name
        with folder_lock(self.folder, patience_seconds=PATIENCE_SECONDS):
            is_known = sha256 is not None and target.is_file()
            if is_known and name not in self.whole and sha256_of_file(target) != sha256:
                download.discard(target)
                is_known = False
            if not is_known:
                self.fetch(name, sha256)
            self.whole.add(name)
            os.utime(target)
        return target

    def fetch(self, name: str, sha256: str | None) -> None:
        """Copy a file here, after making room for it."""
        source, target = f"{self.address}/{name}", self.folder / name
        info = download.file_info(source)
        if info is None:
            raise FileNotFoundError(f"{source} does not exist; check the address")
        others = [(size, path) for _, size, path in self.kept() if path != target]
        used = sum(size for size, _ in others) + int(info["size"] or 0)
        for size, path in others:
            if used <= self.most_bytes:
                break
            used -= size
            download.discard(path)
        download.download(source, target, sha256=sha256)

    def kept(self) -> list[tuple[int, int, Path]]:
        """Return when each copy of any address was last asked for, its bytes and path, by age."""
        found = []
        for path in self.copies.glob("*/*"):
            with suppress(FileNotFoundError):  # another process has just removed it
                status = path.stat()
                if path.is_file() and not path.name.startswith("."):
                    found.append((status.st_mtime_ns, status.st_size, path))
        return sorted(found)
