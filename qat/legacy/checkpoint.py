"""The seeds' checkpoints (`NAME.pt` and `config.json`): files, key names, what is in them.

The one table of their names: V2 and V1 files both are flat state dicts in which a quantized linear
has the keys below and dense parts keep their Hugging Face names. `seed_layer` says what they mean.

Shape legend: O out, I in, R rank, C codebook values.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from qat.legacy.torch_file import is_plain, read_torch_file
from qat.storage.decode import as_type
from qat.storage.files import fingerprint, read_json, sha256_of_file

CONFIG_NAMES = ("config.json", "v2_config.json")
BEST_FILES = ("best_state_dict.pt", "model_state_dict.pt")  # of a run with several
OUR_KEY = "qat"  # what we add to their config

LATENT = "weight"  # (O, I) full precision, where training started or stands
CODEBOOK = "lut"  # (C,)
VALUES = "_Q"  # (O, I) codebook values
INDICES = "_indices"  # (O, I) int64, sometimes int16
SCALE_A = "scale_A"  # (O, R)
SCALE_B = "scale_B"  # (R, I), in V1 padded to whole groups
MAGNITUDE = "rank_magnitude"  # (R,), V2 only
BAKED = "_scales_baked_flag"  # int8
CODEBOOK_STEPS = "_lut_raw_deltas"  # (8,), of a codebook in training
LORA_A, LORA_B = "lora_A", "lora_B"
DERIVED = ("_cached_weight_q",)
KNOWN = {
    *(LATENT, CODEBOOK, VALUES, INDICES, SCALE_A, SCALE_B, MAGNITUDE, BAKED),
    *(CODEBOOK_STEPS, LORA_A, LORA_B, *DERIVED),
}
DEFAULT_GROUP_SIZE = 32  # that their trainer takes where scales are low rank
PRESETS = {  # MLP codebook size and rank, attention codebook size and rank
    "q2a4": (4, 32, 16, 8),
    "q4a4": (16, 4, 16, 4),
    "q4a4_r32": (16, 32, 16, 32),
    "q2a2": (4, 32, 4, 32),
}

Parts = dict[str, Tensor]


class Config(TypedDict, total=False):
    """What is read of config.json, which holds more."""

    model_id: str | None
    force_positive_scales: bool | None
    positive_scale_method: str
    magnitude_activation: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedCheckpoint:
    """A file's tensors by what they belong to, mapped and not read."""

    file: Path
    layers: dict[str, Parts]
    """Tensors of each quantized linear by their key's last part."""
    dense: Parts
    config: dict[str, Any]
    """Of config.json, empty where there is none."""

    @property
    def is_first_form(self) -> bool:
        """Whether this is a V1 checkpoint."""
        return not any(MAGNITUDE in parts for parts in self.layers.values())


def find_seed_file(path: Path) -> Path | None:
    """Return the seeds' checkpoint that a path stands for: the file, or the best one in a folder.

    A folder nested in a folder, and a `run` in it, are looked into.
    """
    if path.is_file():
        return path if path.suffix == ".pt" else None
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return None
    files = sorted(path.glob("*.pt"))
    best = [path / name for name in BEST_FILES if path / name in files]
    if best:
        return best[0]
    folders = [item for item in path.iterdir() if item.is_dir()]
    if path / "run" in folders:
        return find_seed_file(path / "run")
    if len(files) > 1 and not any(path.glob("shard_*.pt")):
        names = ", ".join(file.name for file in files[:4])
        raise ValueError(f"{path} holds several checkpoints ({names}); name one of them")
    if len(files) == 1:
        return files[0]
    return find_seed_file(folders[0]) if len(folders) == 1 and not files else None


def open_seed_checkpoint(file: Path) -> SeedCheckpoint:
    """Return a checkpoint's tensors, mapped, sorted into layers and dense parts."""
    stored, config = load_state(file)
    config = read_seed_config(file) or config
    names = [key.removesuffix(f".{SCALE_A}") for key in stored if key.endswith(f".{SCALE_A}")]
    layers: dict[str, Parts] = {name: {} for name in names}
    dense: Parts = {}
    for key, tensor in stored.items():
        owner, _, part = key.rpartition(".")
        if owner in layers and part != "bias":
            layers[owner][part] = tensor
        else:
            dense[key] = tensor
    if not layers:
        raise ValueError(
            f"{file} has no {SCALE_A} key: it is no checkpoint of the seeds' forms; give another"
        )
    checkpoint = SeedCheckpoint(file=file, layers=layers, dense=dense, config=config)
    check_keys(checkpoint)
    return checkpoint


def load_state(file: Path) -> tuple[Parts, dict[str, Any]]:
    """Return a torch file's state dict and the config that it may carry."""
    stored = read_torch_file(file)
    config: dict[str, Any] = {}
    if isinstance(stored, dict) and isinstance(stored.get("model_state_dict"), dict):
        config, stored = stored.get("config") or {}, stored["model_state_dict"]
    is_state = isinstance(stored, dict) and all(map(is_plain, stored.values()))
    if not is_state or not all(isinstance(key, str) for key in stored):
        raise ValueError(f"{file} is no state dict of tensors; give a checkpoint of the seeds")
    return dict(stored), checked_config(config, file)


def read_seed_config(file: Path) -> dict[str, Any]:
    """Return the config next to a checkpoint, empty where there is none."""
    for name in CONFIG_NAMES:
        if (file.parent / name).is_file():
            return checked_config(read_json(file.parent / name), file.parent / name)
    return {}


def checked_config(config: object, where: Path) -> dict[str, Any]:
    """Return a config that names what is read of it as it must be."""
    as_type(config, Config, where)
    return as_type(config, dict[str, Any], where)


def check_keys(checkpoint: SeedCheckpoint) -> None:
    """Refuse layers with keys that are unknown, missing or not held by a student; names them."""
    is_first = checkpoint.is_first_form
    expected = (CODEBOOK, SCALE_A, SCALE_B, LATENT if is_first else MAGNITUDE)
    unknown, missing = [], []
    for name, parts in checkpoint.layers.items():
        unknown += [f"{name}.{part}" for part in parts if part not in KNOWN]
        missing += [f"{name}.{part}" for part in expected if part not in parts]
        if not is_first and not parts.keys() & {VALUES, INDICES, LATENT}:
            missing.append(f"{name}.{VALUES}")
        if LORA_B in parts and bool(parts[LORA_B].any()):
            raise ValueError(
                f"{name}.{LORA_B} is a recovery adapter, which no quantized layer holds; merge it "
                "into the weights with the program that trained it"
            )
    refuse_keys(checkpoint.file, "unknown", unknown)
    refuse_keys(checkpoint.file, "missing", missing)


def refuse_keys(file: Path, what: str, keys: list[str]) -> None:
    """Raise a ValueError that names keys, if there are any."""
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise ValueError(
            f"{file} has {what} keys: {', '.join(sorted(keys)[:3])}{more}; give another checkpoint"
        )


def content_fingerprint(file: Path) -> str:
    """Return 16 hex digits that name a file's tensors, without reading gigabytes.

    A torch file is a zip, which keeps a checksum of each tensor.
    """
    if not zipfile.is_zipfile(file):
        return sha256_of_file(file)[:16]
    with zipfile.ZipFile(file) as members:
        listing = [[m.filename.partition("/")[2], m.CRC, m.file_size] for m in members.infolist()]
    return fingerprint(listing)


def seed_identity(checkpoint: SeedCheckpoint) -> str:
    """Return 16 hex digits that name a student: its tensors and how they are read."""
    names = ("force_positive_scales", "positive_scale_method", "magnitude_activation")
    reading = {name: checkpoint.config.get(name) for name in names}
    return fingerprint([content_fingerprint(checkpoint.file), reading])


def seed_notes(checkpoint: SeedCheckpoint) -> dict[str, Any]:
    """Return what `write_seed_checkpoint` noted of this file, empty for any other."""
    notes = checkpoint.config.get(OUR_KEY)
    if not isinstance(notes, dict) or notes.get("content") != content_fingerprint(checkpoint.file):
        return {}
    return notes
