"""A run's folder: config.json, metrics.jsonl (one row a step and kind) and summary.json.

config.json holds what the run was asked for under `config`, so that `--config FILE` asks for it
again; a program's own keys are next to it.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypedDict,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec

from qat.storage.decode import MOST, Count, as_type, object_in, read_as
from qat.storage.files import parse_json, write_json, write_text

CONFIG = "config.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
# Held-out distance from the teacher: over the whole vocabulary, or from a cache that keeps a part.
KL_NAMES = ("kl_nats", "kl_nats_lower")
SETTINGS = "config"  # the key of config.json that holds a command's whole config

Config = TypeVar("Config")


Number = Annotated[int, msgspec.Meta(ge=-MOST, le=MOST)] | float | None


class Row(TypedDict):
    """What a row of metrics.jsonl has at least; all else are numbers."""

    step: Count


class Decided(TypedDict, total=False):
    """What is read of the identity of a run, which holds more."""

    settings: dict[str, Any]


class Asked(TypedDict, total=False):
    """What is read of config.json, which holds more."""

    config: dict[str, Any]
    identity: Decided


class Summary(TypedDict, total=False):
    """What reports read of summary.json, which holds more."""

    steps: Count | None
    final_loss: Number
    best_kl_nats: Number
    best_kl_nats_lower: Number
    tokens_seen: Number
    seconds: Number
    tokens_per_second: Number
    bits_per_weight: Number
    bits_per_weight_mlp: Number
    bits_per_weight_model: Number
    kl_nats: Number
    kl_nats_lower: Number
    kd_loss: Number
    loss: Number
    perplexity: Number
    top1_agreement: Number


class RunRecord:
    """Writes what happens in a run, so that a killed process loses at most one line."""

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        """Open the folder for writing.

        Rows after `resume_step`, the last step that the restored state holds, are dropped, as they
        will be written again. None starts over.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None else read_rows(self.folder)
        kept = [row for row in kept if row["step"] <= (resume_step or 0)]
        write_text(self.folder / METRICS, "".join(json.dumps(row) + "\n" for row in kept))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row; a number that is not finite becomes null."""
        row = {"step": step} | {key: json_number(value) for key, value in values.items()}
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write what the run was asked for."""
        write_json(self.folder / CONFIG, dict(config))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write how the run ended; summary.json says that it did."""
        write_json(self.folder / SUMMARY, dict(summary))


def kl_name(values: Mapping[str, Any]) -> str | None:
    """Return which KL some numbers have: the exact one where known, else the other, or None."""
    return next((name for name in KL_NAMES if values.get(name) is not None), None)


def json_number(value: float) -> float | int | None:
    """Return a number that JSON can hold; one-element tensors count as numbers."""
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl in order; empty where there is none.

    A last line that a killed process left half written is left out.
    """
    path = Path(folder) / METRICS
    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        where, remedy = f"{path}:{number}", "remove that line"
        try:
            row = parse_json(line)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{where} is not JSON ({error}); {remedy}") from error
            continue
        rows.append(as_type(row, dict[str, Number], where, remedy=remedy))
        as_type(row, Row, where, remedy=remedy)
    return rows


def read_config(folder: Path) -> dict[str, Any]:
    """Return what the run was asked for; empty where it was not written."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        return {}
    read_as(path, Asked)
    return object_in(path)


def read_summary(folder: Path) -> dict[str, Any]:
    """Return how the run ended; empty where it has not."""
    path = Path(folder) / SUMMARY
    if not path.is_file():
        return {}
    read_as(path, Summary)
    return object_in(path)


def flat_settings(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by the names that flags have, joined with dots."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        is_group = isinstance(value, dict)
        flat |= flat_settings(value, f"{prefix}{name}.") if is_group else {prefix + name: value}
    return flat


def config_as_json(config: object) -> dict[str, Any]:
    """Return a config, a nested dataclass, as JSON holds it: tuples as lists, paths as strings."""
    return json.loads(json.dumps(asdict(config), default=os.fspath))


def config_from_json(config_type: type[Config], values: object, prefix: str = "") -> Config:
    """Return the config that JSON values stand for; keys that are left out have their defaults.

    A config is a dataclass of plain values, tuples, paths and such dataclasses; `prefix` is put
    before its keys in messages.

    Raises:
        ValueError: If a key is unknown or lacking, or a value of another type; names the key.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'config'} {values!r} is not a JSON object")
    known = {f.name: f for f in fields(config_type)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{prefix}{unknown[0]} is not one of {', '.join(known)}")
    required = [f.name for f in known.values() if f.default is f.default_factory is MISSING]
    if lacking := [name for name in required if name not in values]:
        raise ValueError(f"{prefix}{lacking[0]} is missing")
    hints = get_type_hints(config_type)
    return config_type(
        **{name: value_from_json(hints[name], v, f"{prefix}{name}") for name, v in values.items()}
    )


def value_from_json(hint: object, value: object, key: str) -> Any:
    """Return a field's value of the type that it is declared with."""
    kind, options = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return config_from_json(hint, value, f"{key}.")
    if kind in (Union, UnionType):
        return None if value is None else value_from_json(options[0], value, key)
    if kind is tuple and isinstance(value, list):
        return tuple(value_from_json(options[0], item, key) for item in value)
    if hint is Path:
        return Path(value_from_json(str, value, key))
    if hint is float and type(value) is int:
        return float(value)
    if value in options if kind is Literal else type(value) is hint:
        return value
    expected = " | ".join(map(str, options)) if kind is Literal else getattr(hint, "__name__", hint)
    raise ValueError(f"{key} {value!r} is not of type {expected}")
