"""Pushing a cache, a run or a checkpoint into a store: packed, with its checksum."""

import json
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from qat.pipelines.pack import PackResult
from qat.pipelines.stored_items import check_content, kind_of
from qat.storage import archive, stores
from qat.storage.files import hold, read_json, require_plain_name, sweep_half_made
from qat.storage.registry import REGISTRY, Kind, StoredItem, read_registry
from qat.tracking.messages import say

# Of a run: what only serves to resume it, and TensorBoard's copy of metrics.jsonl with its config.
LEFT_OUT = ("state", "wandb", "checkpoints", "tensorboard")
WORDS = ("tokenizer.json", "vocab.json")  # a token may look like a path
LOCAL_PATH = re.compile(r"((?:[\w.-]+=)*)(?:file://)?(?:~|[A-Za-z]:)?[\\/].*[\\/]([^\\/]+)[\\/]?")


@dataclass(frozen=True, kw_only=True, slots=True)
class PushConfig:
    """Pack a cache, a run or a checkpoint and put it into a store; `qat fetch` gets it again.

    Of absolute paths in its records, the last name alone goes: --model-id says where a base is.
    """

    folder: Positional[Path]
    """A cache, a run, a checkpoint: a folder or a .pt file."""
    store: str | None = None
    """Folder or URL of the store; the first that `qat fetch` would look into when not given."""
    name: str | None = None
    """Name in the store, or one of speedrun/registry.toml; the folder's own when not given."""
    suffix: Literal["tar.lz4", "tgz"] = "tar.lz4"
    """Kind of archive; tar.lz4 unpacks many times faster."""
    registry: Path = REGISTRY
    """Where short names are looked up."""


def push(config: PushConfig) -> PackResult:
    """Pack next to the folder, copy, leave nothing here."""
    started = time.perf_counter()
    folder = config.folder.resolve()
    kind = kind_of(folder)
    item = item_named(config.name or folder.name.removesuffix(".pt"), kind, config.registry)
    store = writable_store(config.store)
    check_content(StoredItem(kind=kind, name=folder.name), folder)
    say(f"packing {config.folder} for {store.address(item.store_folder)}")
    near = folder.parent if os.access(folder.parent, os.W_OK) else None
    if near:
        sweep_half_made(near / "push")
    with (
        tempfile.TemporaryDirectory(prefix=".push.", suffix=".part", dir=near) as temporary,
        hold(Path(temporary)),
    ):
        packed = Path(temporary) / f"{item.name}.{config.suffix}"
        source = folder if folder.is_dir() else gathered(folder, Path(temporary) / item.name)
        digest = archive.pack_folder(
            source, packed, leave_out=LEFT_OUT, instead=without_paths(source)
        )
        num_bytes = packed.stat().st_size
        address = stores.put(packed, store, item.store_folder)
    say(f"{address}: {num_bytes:,} bytes")
    seconds = round(time.perf_counter() - started, 2)
    return PackResult(archive=address, bytes=num_bytes, sha256=digest, seconds=seconds)


def item_named(name: str, kind: Kind, registry: Path) -> StoredItem:
    """Return what a thing is called in a store: a short name's file, or the name itself."""
    require_plain_name(name, "--name")
    item = read_registry(registry).get(name) or StoredItem(kind=kind, name=name)
    if item.kind != kind:
        raise ValueError(f"--name {name} stands for a {item.kind}, this is a {kind}")
    return replace(item, stored_as="")


def writable_store(base: str | None) -> stores.Store:
    """Return the store to put things into."""
    found = [stores.named_store(base, "--store")] if base else stores.find_stores()
    if not found:
        raise FileNotFoundError(f"there is no store; give --store, or {stores.HOW_TO_GIVE}")
    stores.require_writable(found[0])
    return found[0]


def gathered(file: Path, folder: Path) -> Path:
    """Return a new folder with a .pt file and the config next to it."""
    folder.mkdir()
    for path in (file, file.with_name("config.json")):
        if path.is_file():
            shutil.copy2(path, folder / path.name)
    return folder


def without_paths(folder: Path) -> dict[Path, bytes]:
    """Return what goes in the place of JSON files that hold absolute paths of this machine."""
    instead = {}
    for path in folder.rglob("*.json"):
        if path.name in WORDS or path.relative_to(folder).parts[0] in LEFT_OUT:
            continue
        values = read_json(path)
        shown = shortened(values)
        if shown != values:
            instead[path] = (json.dumps(shown, indent=1) + "\n").encode()
    return instead


def shortened(value: object) -> object:
    """Return a JSON value with the last name alone of strings that are absolute paths."""
    if isinstance(value, dict):
        return {key: shortened(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shortened(one) for one in value]
    if isinstance(value, str) and (found := LOCAL_PATH.fullmatch(value)):
        return found[1] + found[2]
    return value
