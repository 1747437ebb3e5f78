"""`qat push`: a cache, a run or a checkpoint into a store, packed, with its checksum."""

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from qat.cli.command import run_command
from qat.storage.registry import Kind
from qat.tracking.messages import say

LEFT_OUT = ("state", "wandb", "checkpoints")  # of a run: what only serves to go on with it


@dataclass(frozen=True, kw_only=True, slots=True)
class PushConfig:
    """Pack a cache, a run or a checkpoint and put it into a store; `qat fetch` gets it again."""

    folder: Positional[Path]
    """A cache, a run, a checkpoint: a folder or a .pt file."""
    store: str | None = None
    """Folder or URL of the store; the first that `qat fetch` would look into when not given."""
    name: str | None = None
    """Name in the store, or a word of speedrun/registry.toml; the folder's own when not given."""
    suffix: Literal["tar.lz4", "tgz"] = "tar.lz4"
    """Kind of archive; tar.lz4 unpacks many times faster."""
    registry: Path | None = None
    """Another registry than speedrun/registry.toml."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat push", PushConfig, push, argv)


def push(config: PushConfig) -> dict[str, Any]:
    """Pack beside the folder, copy, leave nothing here; return the closing values."""
    from qat.pipelines.stored import check_content, shortcut_for
    from qat.storage import archive, stores
    from qat.storage.registry import Shortcut

    started = time.perf_counter()
    folder = config.folder.resolve()
    kind = kind_of(folder)
    wanted = shortcut_for(config.name or folder.name.removesuffix(".pt"), kind, config.registry)
    store = pushing_store(config.store)
    check_content(Shortcut(kind=kind, name=folder.name), folder)
    say(f"packing {config.folder} for {store.address(wanted.store_folder)}")
    beside = folder.parent if os.access(folder.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".push.", dir=beside) as temporary:
        packed = Path(temporary) / f"{wanted.name}.{config.suffix}"
        source = folder if folder.is_dir() else gathered(folder, Path(temporary) / wanted.name)
        digest = archive.pack_folder(source, packed, leave_out=LEFT_OUT)
        num_bytes = packed.stat().st_size
        address = stores.put(packed, store, wanted.store_folder)
    say(f"{address}: {num_bytes:,} bytes")
    seconds = round(time.perf_counter() - started, 2)
    return {"archive": address, "bytes": num_bytes, "sha256": digest, "seconds": seconds}


def pushing_store(base: str | None) -> Any:
    """Return the store to put things into.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it takes nothing.
    """
    from qat.storage import stores

    found = [stores.named_store(base, "--store")] if base else stores.find_stores()
    if not found:
        raise FileNotFoundError(f"there is no store; give --store, or {stores.HOW_TO_GIVE}")
    stores.require_writable(found[0])
    return found[0]


def kind_of(path: Path) -> Kind:
    """Return what a path holds: a cache's folder has a manifest or shards."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a cache, a run or a checkpoint")
    is_cache = (path / "manifest.json").is_file() or any(path.glob("shard_*.pt"))
    return "cache" if is_cache else "checkpoint"


def gathered(file: Path, folder: Path) -> Path:
    """Return a new folder with a .pt file and the config beside it."""
    folder.mkdir()
    for path in (file, file.with_name("config.json")):
        if path.is_file():
            shutil.copy2(path, folder / path.name)
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
