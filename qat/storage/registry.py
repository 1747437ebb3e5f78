"""Short names of what lies in a store (L64, q4_fp32, ...), read from speedrun/registry.toml."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qat.storage.decode import FileName, Sha256, as_type

Kind = Literal["cache", "checkpoint"]
REGISTRY = Path(__file__).parents[2] / "speedrun" / "registry.toml"
STORE_FOLDERS: dict[str, str] = {"cache": "qwen3_caches", "checkpoint": "qwen3_runs"}
LOCAL_FOLDERS: dict[str, str] = {"cache": "caches", "checkpoint": "runs/speedrun"}
CACHE_NAME = re.compile(r"_L\d+_K\d+_R\d+")  # as caches are named


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredItem:
    """A cache or checkpoint in a store."""

    kind: Kind
    name: FileName
    """Without suffix; also of the folder here."""
    stored_as: str = ""
    """The file that `sha256` is of."""
    files: tuple[FileName, ...] = ()
    """What a plain folder holds, for stores that cannot list."""
    size: str | None = None
    sha256: Sha256 | None = None
    fingerprint: str | None = None
    """Of a cache of our form."""
    notes: str = ""

    @property
    def store_folder(self) -> str:
        """Return the folder of a store that it lies in."""
        return STORE_FOLDERS[self.kind]

    def local_path(self, output_dir: Path | None = None) -> Path:
        """Return where it goes here.

        A checkpoint's folder ends in .pt, as the seeds' commands name what they unpack.
        """
        folder = output_dir or Path(LOCAL_FOLDERS[self.kind])
        return folder / (f"{self.name}.pt" if self.kind == "checkpoint" else self.name)


def read_registry(path: Path = REGISTRY) -> dict[str, StoredItem]:
    """Return all items by short name; none where this is no checkout with a registry."""
    if not path.is_file():
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not TOML ({error}); correct it") from error
    items = {}
    for name, fields in values.items():
        items[name] = as_type(fields, StoredItem, f"{path}, {name}", remedy="correct it")
    return items


def likely_kind(address: str) -> Kind:
    """Return what an address holds, by its folder and its name."""
    if STORE_FOLDERS["checkpoint"] in address.split("/"):
        return "checkpoint"
    is_cache = STORE_FOLDERS["cache"] in address.split("/") or CACHE_NAME.search(address)
    return "cache" if is_cache else "checkpoint"
