"""Receipts: what a folder was extracted or fetched from, and whether it is unchanged since."""

from dataclasses import asdict, dataclass
from pathlib import Path

from qat.storage.decode import as_type
from qat.storage.files import read_json, recover_interrupted_replace, write_json

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


def write_receipt(
    folder: Path, source: str, sha256: str | None, *, source_stamp: Stamp | None = None
) -> None:
    """Record a whole folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stamps = {str(path.relative_to(folder)): stamp(path) for path in files}
    receipt = Receipt(source=source, sha256=sha256, source_stamp=source_stamp, files=stamps)
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
