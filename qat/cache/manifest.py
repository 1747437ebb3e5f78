"""What a cache is: its identity, its shards, and the refusal of a cache that does not fit.

`manifest.json` is written last, so that its presence says that the cache is whole.
"""

import hashlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta
from transformers import PreTrainedTokenizerBase

from qat.cache.config import NUM_DRAWS, BuildCacheConfig
from qat.data.records import holds_one_document, source_revision
from qat.data.text import TOKENIZER_HASH_VERSION, bos_id, tokenizer_sha256
from qat.storage.decode import MOST, Count, FileName, Sha256, Size, as_type, read_as
from qat.storage.files import canonical_json, fingerprint, read_json, write_json

CODEC_VERSION = 1
MANIFEST_FILE = "manifest.json"
BUILDING_FILE = "building.json"  # the identity of a cache whose shards are being written
REMEDY = "build or fetch the cache again"
StoredContent = Literal["top-k", "sampled", "hidden", "conditional"]
# Fields that caches of version 0.1.0 lack. Their defaults say what those caches are, and are left
# out of the fingerprint, so that it stays the one that was recorded.
ADDED_FIELDS = (
    "tokenizer_hash_version",
    "block_start",
    "block_start_id",
    "documents",
    "text_sequences",
)


class CacheMismatch(ValueError):  # noqa: N818 the documented name
    """A cache that does not fit the model, tokenizer or run that asks for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file of a cache."""

    file: FileName
    sha256: Sha256 | None
    """None only for files of an imported cache, which keeps no checksum."""
    num_bytes: Count
    num_sequences: Count = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheIdentity:
    """All that decides a cache's bytes on one device. None = not known (an imported cache)."""

    content: StoredContent
    """conditional: top-k without the tail's mass, as imported caches are."""
    teacher_weights: str | None
    """Hash of the teacher's weight files."""
    tokenizer_sha256: str | None
    """As `tokenizer_sha256` computes it."""
    template_sha256: str | None
    """Of the chat template; None where none was used."""
    data_revision: str | None
    """Hash of the files, or the hub's revision."""
    format: str | None
    thinking: str | None
    loss_on: str
    seq_len: Annotated[int, Meta(ge=2, le=MOST)]
    top_k: Count
    num_draws: Count = 0
    num_negatives: Count = 0
    max_sequences: Count | None = None
    """The limit that was asked for."""
    heldout_ratio: int | float
    """An int stays one: the fingerprint is of the JSON text."""
    seed: int | None
    dtype: str | None
    """The teacher's."""
    codec_version: int = CODEC_VERSION
    tokenizer_hash_version: int = 1
    block_start: Literal["bos", "none"] = "none"
    """bos: every block starts with BOS, as the teacher was trained."""
    block_start_id: Count | None = None
    """Token id of BOS."""
    documents: Literal["separate", "joined"] = "joined"
    """separate: documents in one block do not attend to each other."""
    text_sequences: Count = 0
    """The limit of further training blocks, which the teacher has not read."""

    def __post_init__(self) -> None:
        """Refuse what another version wrote."""
        if self.codec_version != CODEC_VERSION:
            raise ValueError(f"codec_version {self.codec_version} is not {CODEC_VERSION}")

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name the cache."""
        defaults = {item.name: item.default for item in fields(self) if item.name in ADDED_FIELDS}
        values = asdict(self).items()
        return fingerprint({k: v for k, v in values if k not in defaults or v != defaults[k]})


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheManifest:
    """Identity, names for people, sizes and files of a whole cache."""

    identity: CacheIdentity
    teacher_name: str | None
    data_name: str | None
    vocab_size: Size | None
    """Width of the teacher's logits, padding included; None where an old cache does not say."""
    num_sequences: Size
    num_heldout: Count
    """The last sequences are the held-out ones."""
    shards: tuple[FileEntry, ...]
    head: FileEntry | None = None
    """The teacher's output matrix, for hidden content."""
    text: FileEntry | None = None
    """Token ids of further training blocks, which the teacher has not read."""

    def __post_init__(self) -> None:
        """Refuse numbers that contradict each other."""
        stored = sum(shard.num_sequences for shard in self.shards)
        if self.num_sequences != stored or self.num_heldout > stored:
            raise ValueError(
                f"num_sequences {self.num_sequences}, num_heldout {self.num_heldout} and the "
                f"shards' {stored} sequences contradict each other"
            )
        if (self.identity.content == "hidden") != (self.head is not None):
            raise ValueError(f"content {self.identity.content} and head contradict each other")

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name the cache."""
        return self.identity.fingerprint

    @property
    def num_tokens(self) -> int:
        """Tokens in all blocks."""
        return self.num_sequences * self.identity.seq_len

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the shards for each token; the head comes once, whatever the length."""
        return sum(shard.num_bytes for shard in self.shards) / self.num_tokens

    @property
    def head_bytes(self) -> int:
        """Bytes of the teacher's output matrix; 0 where the content needs none."""
        return self.head.num_bytes if self.head else 0


def write_manifest(folder: Path, manifest: CacheManifest) -> None:
    """Declare a cache whole."""
    write_json(folder / MANIFEST_FILE, {"fingerprint": manifest.fingerprint, **asdict(manifest)})


def read_manifest(folder: Path) -> CacheManifest:
    """Return a cache's manifest, checked against its own fingerprint.

    Raises:
        CacheMismatch: If the manifest was altered or is of another version.
        FileNotFoundError: If the cache is not whole.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {MANIFEST_FILE}: no cache, or one whose build was cut short; "
            "run its `qat build-cache` again"
        )
    values = as_type(read_json(path), dict[str, Any], path, remedy=REMEDY, refuse=CacheMismatch)
    recorded = values.pop("fingerprint", None)
    manifest = as_type(values, CacheManifest, path, remedy=REMEDY, refuse=CacheMismatch)
    if recorded != manifest.fingerprint:
        raise CacheMismatch(
            f"{path}: fingerprint {recorded} is recorded but its fields give "
            f"{manifest.fingerprint}; the manifest was altered, so build the cache again"
        )
    return manifest


def read_identity(path: Path) -> CacheIdentity:
    """Return the identity in a file that a build left."""
    remedy = f"remove {path.parent} and build the cache again"
    return read_as(path, CacheIdentity, remedy=remedy, refuse=CacheMismatch)


def require_equal(recorded: object, given: object, field: str, remedy: str) -> None:
    """Refuse two values of a field that differ; an unknown one (None) passes."""
    if recorded is not None and given is not None and recorded != given:
        raise CacheMismatch(f"the cache has {field} {recorded}, here it is {given}; {remedy}")


def require_identity(recorded: CacheIdentity, expected: CacheIdentity, folder: Path) -> None:
    """Refuse a folder that holds another cache than the one to be built."""
    for field in fields(CacheIdentity):
        found, asked = getattr(recorded, field.name), getattr(expected, field.name)
        if found != asked:
            raise CacheMismatch(
                f"{folder} holds a cache with {field.name} {found}, asked for is {asked}; "
                "choose another --name or remove the folder"
            )


def template_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a hash of the chat template, or None where there is none."""
    template = tokenizer.chat_template
    return hashlib.sha256(canonical_json(template).encode()).hexdigest() if template else None


def expected_identity(
    config: BuildCacheConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    teacher_weights: str,
    dtype: str,
) -> CacheIdentity:
    """Return the identity of the cache that a config asks for, of a teacher of these weights."""
    bos = bos_id(tokenizer)
    return CacheIdentity(
        content=config.content,
        teacher_weights=teacher_weights,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        tokenizer_hash_version=TOKENIZER_HASH_VERSION,
        template_sha256=None if config.thinking == "none" else template_sha256(tokenizer),
        data_revision=source_revision(config.data),
        format=config.format,
        thinking=config.thinking,
        loss_on=config.loss_on,
        seq_len=config.seq_len,
        top_k=config.kept_ids,
        num_draws=NUM_DRAWS if config.content == "sampled" else 0,
        num_negatives=config.num_negatives,
        max_sequences=config.num_sequences,
        text_sequences=config.text_sequences,
        heldout_ratio=config.heldout_ratio,
        seed=config.seed,
        dtype=dtype,
        block_start="none" if bos is None else "bos",
        block_start_id=bos,
        documents="joined" if holds_one_document(config.data) else "separate",
    )


def default_name(identity: CacheIdentity, data_name: str) -> str:
    """Return `{dataset}_{template}_think_{mode}_L.._K.._R..-{fingerprint}`."""
    dataset = Path(data_name.partition("@")[0].rstrip("/")).stem.replace(" ", "-")
    template = "text" if identity.thinking == "none" else "chat"
    return (
        f"{dataset}_{template}_think_{identity.thinking}_L{identity.seq_len}"
        f"_K{identity.top_k}_R{identity.num_negatives}-{identity.fingerprint}"
    )
