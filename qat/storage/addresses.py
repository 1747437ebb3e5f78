"""Addresses that fsspec opens, such as s3://bucket/run, told from paths where either may be given.

A setting that takes a path is a `Path`, which holds an address with one slash of its two:
`as_address` gives it back. Where an address goes, the field says so by `TAKES_ADDRESS`.
"""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

from qat.storage.files import fingerprint

TAKES_ADDRESS = {"takes_address": True}
# One letter is a drive of Windows; an unknown protocol is refused where it is opened.
ADDRESS = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]+):/+(?P<rest>[^/].*)", re.DOTALL)


def as_address(path: str | Path) -> str | None:
    """Return the address that a setting holds, without a slash at its end; None of a path."""
    found = ADDRESS.fullmatch(path.as_posix() if isinstance(path, Path) else path)
    if found is None:
        return None
    root = "/" if found["protocol"] in ("file", "local", "memory") else ""
    return f"{found['protocol']}://{root}{found['rest'].rstrip('/')}"


def working_folder(address: str, folder: str) -> Path:
    """Return the folder here of what lies at an address, of its own for each."""
    name = re.sub(r"[^\w.-]", "_", address.rpartition("/")[2]).lstrip(".")
    return Path(folder) / f"{name}-{fingerprint(address)}"


def require_paths(config: object) -> None:
    """Refuse an address where a config takes a path alone, before a folder of its name is made.

    Raises:
        ValueError: Names the setting, the address and the remedy.
    """
    for flag, value in paths_alone(config):
        address = as_address(value)
        if address is not None:
            raise ValueError(
                f"--{flag} {address} is an address, and a path on this machine goes there; "
                "`qat fetch` brings things here and `qat push` takes them to a store"
            )


def paths_alone(config: object, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Yield the flag and the value of each path of a nested config that may be no address."""
    for field in fields(config):
        value, flag = getattr(config, field.name), prefix + field.name.replace("_", "-")
        if is_dataclass(value):
            yield from paths_alone(value, f"{flag}.")
        elif field.metadata.get("takes_address"):
            continue
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, Path):
                yield flag, one
