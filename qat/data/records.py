"""Data sources to records: files, folders and hub names, one JSON object a record."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qat.storage.decode import reading
from qat.storage.files import fingerprint, parse_json, sha256_of_file
from qat.storage.hub import PREFIX, parse_hub_name

Record = dict[str, Any]

DEFAULT_SPLIT = "train"
TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (".json", ".jsonl", ".parquet", *TEXT_SUFFIXES)


class HubSource(NamedTuple):
    """A hub data set and what is read of it."""

    repository: str
    revision: str | None
    config: str | None
    split: str

    @property
    def chosen(self) -> str:
        """Return config and split where they are not the usual ones, empty else."""
        is_usual = self.config is None and self.split == DEFAULT_SPLIT
        return "" if is_usual else f":{self.config or ''}:{self.split}"


def parse_hub_source(name: str) -> HubSource | None:
    """Return what `[hf:]OWNER/NAME[@REVISION][:CONFIG[:SPLIT]]` says; None where that is a path."""
    prefix = PREFIX if name.startswith(PREFIX) else ""
    where, *chosen = name.removeprefix(prefix).split(":")
    found = parse_hub_name(prefix + where)
    if found is None or len(chosen) > 2:
        return None
    config, split = [*chosen, *[""] * (2 - len(chosen))]
    return HubSource(*found, config or None, split or DEFAULT_SPLIT)


def read_records(source: str) -> Iterator[Record]:
    """Yield the records of a file, a folder (its files by name) or a hub name."""
    files = source_files(source)
    for file in files:
        yield from read_file(file)
    if not files:
        yield from read_hub(source)


def source_files(source: str) -> list[Path]:
    """Return the files of a source in the order in which they are read; none of a hub name."""
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if not files:
            raise ValueError(
                f"--data {source} has no file ending in {', '.join(SUFFIXES)}; give one"
            )
        return files
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"--data {path} does not end in {', '.join(SUFFIXES)}; convert it")
        return [path]
    if parse_hub_source(source) is None:
        raise FileNotFoundError(
            f"--data {source} does not exist; give a file, a folder, or a hub data set as "
            "hf:OWNER/NAME[@REVISION][:CONFIG[:SPLIT]]"
        )
    return []


def source_name(source: str) -> str:
    """Return what people call a source: a path's last part, or the hub name as given."""
    return Path(source).resolve().name if source_files(source) else source


def holds_one_document(source: str) -> bool:
    """Whether a data source is a single plain text file."""
    files = source_files(source)
    return len(files) == 1 and files[0].suffix in TEXT_SUFFIXES


def source_revision(source: str) -> str:
    """Return what names a source's content: a hash of its files, or the hub's revision."""
    files = source_files(source)
    if files:
        return fingerprint([sha256_of_file(file) for file in files])
    from huggingface_hub import dataset_info
    from huggingface_hub.errors import HFValidationError

    found = parse_hub_source(source)
    try:
        sha = str(dataset_info(found.repository, revision=found.revision).sha)
    except (HFValidationError, OSError) as error:
        raise no_hub_data(source, error) from error
    return sha + found.chosen


def no_hub_data(name: str, error: Exception) -> FileNotFoundError:
    """Return the error of a source that is neither a path nor a hub name within reach."""
    return FileNotFoundError(
        f"--data {name} is no file, folder or hub data set within reach; give one that is "
        f"({type(error).__name__})"
    )


def read_file(path: Path) -> Iterator[Record]:
    """Yield the records of one file by its suffix; a text file is one record.

    Not through `datasets`, which changes records: its JSON reader (5.2) makes dates of strings
    that look like one, gives each record the keys of all others, and does not name a broken line.
    It also leaves a lock file in the user's cache for each file that it reads.
    """
    if path.suffix in TEXT_SUFFIXES:
        yield {"text": read_text(path)}
    elif path.suffix == ".parquet":
        yield from read_parquet(path)
    elif path.suffix == ".jsonl":
        yield from read_lines(path)
    else:
        yield from read_json_records(path)


def read_text(path: Path) -> str:
    """Return a UTF-8 file's text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); convert it") from error


def read_lines(path: Path) -> Iterator[Record]:
    """Yield one record a line, blank lines apart."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                record = parse_json(line)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where} is not UTF-8 text ({error.reason}); convert it"
                ) from error
            except ValueError as error:
                raise ValueError(f"{where} is not JSON ({error}); correct or remove it") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where} is not a JSON object; correct or remove it")
            yield record


def read_json_records(path: Path) -> Iterator[Record]:
    """Yield the records of a JSON list, or of the first list in a JSON object."""
    text = read_text(path)
    try:
        value = parse_json(text)
    except ValueError:
        yield from read_lines(path)  # many .json files hold one object a line
        return
    if isinstance(value, dict):
        value = next((item for item in value.values() if isinstance(item, list)), [value])
    if not isinstance(value, list):
        raise ValueError(f"{path} holds no JSON list or object; convert it")
    for index, record in enumerate(value):
        if not isinstance(record, dict):
            raise ValueError(f"{path} item {index} is not a JSON object; remove it")
        yield record


def read_parquet(path: Path) -> Iterator[Record]:
    """Yield a parquet file's rows, a batch in memory at a time."""
    import pyarrow.parquet

    with reading(path, "fetch it again, or convert it"):
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def read_hub(name: str) -> Iterator[Record]:
    """Yield a hub data set, streamed; `parse_hub_source` reads its name."""
    from datasets import load_dataset

    found = parse_hub_source(name)
    try:
        records = load_dataset(
            found.repository,
            name=found.config,
            split=found.split,
            streaming=True,
            revision=found.revision,
        )
    except (ValueError, OSError) as error:
        raise no_hub_data(name, error) from error
    yield from records
