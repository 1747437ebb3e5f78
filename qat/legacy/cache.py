"""The seeds' caches (`meta.json`, `shard_00000.pt`, ...) as ours; only here are their key names.

They keep raw logits on K ids and no log-partition, so a probability is known only relative to
the other K: the content is "conditional". Their R uniform ids are read but no loss uses them.

Shape legend: n sequences of a shard, L tokens of a block, T = L - 1, K top-k, R negatives.
"""

from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from qat.cache.codec import Fields
from qat.cache.manifest import CacheIdentity, CacheManifest, CacheMismatch, FileEntry
from qat.cache.read import TeacherCache
from qat.legacy.torch_file import is_plain, read_torch_file
from qat.storage.decode import Size, as_type, read_as
from qat.storage.files import fingerprint

META_FILE = "meta.json"
SHARD_PATTERN = "shard_*.pt"
HELDOUT_RATIO = 0.125
# Their key: our field and its number of axes, the sequences' one included.
FIELD_OF_KEY = {
    "input_ids": ("input_ids", 2),
    "attention_mask": ("loss_mask", 2),
    "topk_idx": ("token_ids", 3),
    "topk_logits": ("logits", 3),
    "rand_idx": ("negative_ids", 3),
    "rand_logits": ("negative_logits", 3),
}


class Meta(TypedDict, total=False):
    """What is read of meta.json, which holds more."""

    teacher_model: str | None
    dataset_name: str | None
    dataset_format: str | None
    chat_thinking: str | None
    vocab_size: Size | None


REQUIRED_KEYS = ("input_ids", "topk_idx", "topk_logits")


def is_seed_cache(folder: Path) -> bool:
    """Whether a folder has shards of the seeds' form."""
    return any(folder.glob(SHARD_PATTERN))


def open_seed_cache(folder: Path) -> TeacherCache:
    """Return the cache in a folder with shards of the seeds' form."""
    return TeacherCache(folder, read_seed_manifest(folder), read_seed_shard)


def read_seed_manifest(folder: Path) -> CacheManifest:
    """Return what is known of a cache of the seeds' form.

    Every shard is opened, which maps it without reading its bytes. They recorded no held-out
    split, so the last eighth stands for one.

    Raises:
        CacheMismatch: If a shard is missing in the row, broken, or unlike the first.
    """
    meta = {}
    if (folder / META_FILE).is_file():
        meta = read_as(folder / META_FILE, dict[str, Any], refuse=CacheMismatch)
        as_type(meta, Meta, folder / META_FILE, refuse=CacheMismatch)
    paths = sorted(folder.glob(SHARD_PATTERN))
    entries, first = [], {}
    for index, path in enumerate(paths):
        if path.stem != f"shard_{index:05d}":
            raise CacheMismatch(f"{folder}: shard_{index:05d}.pt is missing; fetch the cache again")
        fields = read_seed_shard(path)
        first = first or fields
        require_alike(path, fields, first)
        num_bytes = path.stat().st_size
        entries.append(
            FileEntry(
                file=path.name,
                sha256=None,
                num_bytes=num_bytes,
                num_sequences=len(fields["input_ids"]),
            )
        )
    num_sequences = sum(entry.num_sequences for entry in entries)
    num_heldout = max(1, round(num_sequences * HELDOUT_RATIO)) if num_sequences >= 8 else 0
    return CacheManifest(
        identity=seed_identity(meta, entries, first),
        teacher_name=meta.get("teacher_model"),
        data_name=meta.get("dataset_name"),
        vocab_size=meta.get("vocab_size"),
        num_sequences=num_sequences,
        num_heldout=num_heldout,
        shards=tuple(entries),
    )


def seed_identity(meta: dict[str, Any], entries: list[FileEntry], first: Fields) -> CacheIdentity:
    """Return the identity of a seeds' cache; its revision stands for meta and file sizes."""
    sizes = [[entry.file, entry.num_bytes, entry.num_sequences] for entry in entries]
    negatives = first.get("negative_ids")
    return CacheIdentity(
        content="conditional",
        teacher_weights=None,
        tokenizer_sha256=None,
        template_sha256=None,
        data_revision=fingerprint([meta, sizes]),
        format=meta.get("dataset_format"),
        thinking=meta.get("chat_thinking"),
        loss_on="all",
        seq_len=first["input_ids"].shape[1],
        top_k=first["token_ids"].shape[2],
        num_negatives=0 if negatives is None else negatives.shape[2],
        heldout_ratio=HELDOUT_RATIO,
        seed=None,
        dtype=None,
    )


def read_seed_shard(path: Path) -> Fields:
    """Return a shard of the seeds' form under our names, mapped where its file allows."""
    stored = load_tensors(path)
    missing = [key for key in REQUIRED_KEYS if key not in stored]
    if missing:
        raise CacheMismatch(
            f"{path} has no {', '.join(missing)}: it is no shard of a cache; fetch it again"
        )
    fields = {
        name: with_axes(path, key, stored[key], axes)
        for key, (name, axes) in FIELD_OF_KEY.items()
        if key in stored
    }
    fields.setdefault("loss_mask", torch.ones_like(fields["input_ids"], dtype=torch.bool))
    fields["loss_mask"] = fields["loss_mask"].bool()
    num_sequences, seq_len = fields["input_ids"].shape
    if fields["token_ids"].shape[:2] != (num_sequences, seq_len - 1):
        raise CacheMismatch(
            f"{path} has topk_idx of shape {tuple(fields['token_ids'].shape)} for input_ids of "
            f"shape {(num_sequences, seq_len)}; fetch the cache again"
        )
    return fields


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return a torch file's tensors, mapped where its form allows."""
    try:
        stored = read_torch_file(path)
    except ValueError as error:
        raise CacheMismatch(str(error)) from error
    if not isinstance(stored, dict):
        raise CacheMismatch(
            f"{path} holds a {type(stored).__name__}, not a shard of a cache; fetch it again"
        )
    return stored


def with_axes(path: Path, key: str, field: Tensor, axes: int) -> Tensor:
    """Return a field with its sequences' axis; single examples were stored without.

    Raises:
        CacheMismatch: If it is no plain tensor of so many axes.
    """
    if not is_plain(field) or field.dim() not in (axes - 1, axes):
        raise CacheMismatch(f"{path}: {key} is no tensor of {axes} axes; fetch the cache again")
    return field.unsqueeze(0) if field.dim() == axes - 1 else field


def require_alike(path: Path, fields: Fields, first: Fields) -> None:
    """Refuse a shard whose shapes are not those of the first."""
    for name, field in first.items():
        found = fields[name].shape[1:] if name in fields else None
        if found != field.shape[1:]:
            raise CacheMismatch(
                f"{path} has {name} of {found} a sequence, the first shard {field.shape[1:]}; "
                "the folder mixes two caches: fetch it again"
            )
