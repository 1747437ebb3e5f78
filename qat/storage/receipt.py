"""Receipts: what a folder was extracted or fetched from, and whether it is unchanged since."""

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from qat.storage.decode import as_type
from qat.storage.files import read_json, recover_interrupted_replace, sweep_half_made, write_json

Stamp = list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """Written next to a folder once the folder is whole."""

    source: str
    """Path or URL."""
    sha256: str | None
    """Of the archive; None of a plain folder."""
    source_stamp: Stamp | None = None
    """Of an archive on this disk."""
    files: dict[str, Stamp]


def receipt_path(folder: Path) -> Path:
    """Return where the receipt of a folder lies: next to it."""
    return folder.with_name(f".{folder.name}.fetched.json")


def stamp(path: Path) -> Stamp:
    """Return a file's size and time, which change when it does."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


class Verified:
    """Of which files of a folder something was found, such as a checksum, and are unchanged since.

    It is written into the folder, so that one process after another need not read all of them.
    """

    def __init__(self, folder: Path) -> None:
        """Read what earlier processes found, if they did."""
        self.folder = Path(folder).absolute()
        self.path = self.folder / ".verified.json"
        self.known = self.read()

    def read(self) -> dict[str, list[str | int]]:
        """Return what is written; nothing of a file that is no such receipt."""
        try:
            return as_type(read_json(self.path), dict[str, list[str | int]], self.path)
        except (OSError, ValueError):
            return {}

    def holds(self, name: str, *found: str | int) -> bool:
        """Return whether this was found of a file."""
        return self.known.get(name) == self.entry(name, found)

    def add(self, name: str, *found: str | int) -> None:
        """Write down what was found of a file; where nobody may write, it is found again."""
        self.known = {**self.read(), **self.known, name: self.entry(name, found)}
        with suppress(OSError):
            write_json(self.path, self.known)

    def entry(self, name: str, found: tuple[str | int, ...]) -> list[str | int]:
        """Return what was found with what changes with a file; a copy of it is another one."""
        path = self.folder / name
        return [*found, *stamp(path), path.stat().st_ino]


def write_receipt(
    folder: Path, source: str, sha256: str | None, *, source_stamp: Stamp | None = None
) -> None:
    """Record a whole folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stamps = {str(path.relative_to(folder)): stamp(path) for path in files}
    receipt = Receipt(source=source, sha256=sha256, source_stamp=source_stamp, files=stamps)
    sweep_half_made(receipt_path(folder))
    write_json(receipt_path(folder), asdict(receipt))


def read_receipt(folder: Path) -> Receipt | None:
    """Return the receipt of a folder if all that it lists is there unchanged."""
    recover_interrupted_replace(folder)
    path = receipt_path(folder)
    if not (path.is_file() and folder.is_dir()):
        return None
    values = read_json(path)
    try:
        receipt = as_type(values, Receipt, path)
    except ValueError:  # other fields: written by another version
        return None
    is_whole = all(
        (folder / name).is_file() and stamp(folder / name) == then
        for name, then in receipt.files.items()
    )
    return receipt if is_whole else None
