"""Shards of token ids: files of whole documents, and the manifest that declares them whole.

A shard holds consecutive records of one source file: its training documents one after the other,
then its held-out ones, each as `[BOS] tokens EOS`. `manifest.json` is written last.

Shape legend: n tokens of a shard, d documents of it.
"""

import hashlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from qat.storage.decode import Count, FileName, Sha256, Size, as_type, read_as
from qat.storage.files import atomic_file, fingerprint, read_json, sha256_of_file, write_json
from qat.storage.receipt import Verified

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
BUILDING_FILE = "building.json"  # the identity of shards that are being written
TOKENIZER_FOLDER = "tokenizer"
TOKENS, ENDS = "token_ids", "document_ends"  # the fields of a file
WIDEST_UINT16 = 1 << 16  # ids of larger vocabularies take four bytes
REMEDY = "remove the folder and run `qat tokenize` again"


class DamagedShards(ValueError):  # noqa: N818 as CacheMismatch
    """Shards that are not the ones that were written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenShard:
    """One file: where its records come from, and what it holds of them."""

    file: FileName
    sha256: Sha256
    num_bytes: Size
    source: Count
    """Index of the source file in the data."""
    num_records: Size
    """Read for it, empty ones included."""
    num_documents: Size
    """Training and held-out together."""
    num_tokens: Count
    """Of training documents, which come first."""
    num_heldout_tokens: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenIdentity:
    """All that decides the bytes of shards."""

    tokenizer_sha256: str
    """Of all that turns text into ids."""
    data: tuple[str, ...]
    """The sha256 of each source file in order; of a hub data set its revision."""
    text_column: str
    heldout_ratio: int | float
    shard_tokens: Size
    bos_id: Count | None
    """Put before each document; None where the tokenizer puts nothing."""
    separator_id: Count
    """EOS, put after each document."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Refuse what another version wrote."""
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"format_version {self.format_version} is not {FORMAT_VERSION}")

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name the shards."""
        return fingerprint(asdict(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenManifest:
    """Identity, names for people, and the files of whole shards."""

    identity: TokenIdentity
    data_name: str
    vocab_size: Size
    """Of the tokenizer."""
    shards: tuple[TokenShard, ...]
    """By source, then by place in it."""


def is_heldout(text: str, ratio: float) -> bool:
    """Whether a document is held out: its hash decides, so its copies are on the same side."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) < ratio * 2**64


def write_shard(
    path: Path,
    train: list[np.ndarray],
    heldout: list[np.ndarray],
    *,
    vocab_size: int,
    source: int,
    num_records: int,
) -> TokenShard:
    """Write documents under the final name when whole; return the entry.

    `train` and `heldout` are token ids of documents, (n_i,) each.
    """
    documents = [*train, *heldout]
    ids = np.concatenate(documents)
    narrow = np.uint16 if vocab_size <= WIDEST_UINT16 else np.int32
    fields_of_file = {
        TOKENS: torch.from_numpy(ids.astype(narrow)),  # (n,)
        ENDS: torch.tensor([len(document) for document in documents]).cumsum(0),  # (d,) int64
    }
    data = save(fields_of_file)
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)
    num_heldout = sum(map(len, heldout))
    return TokenShard(
        file=path.name,
        sha256=hashlib.sha256(data).hexdigest(),
        num_bytes=len(data),
        source=source,
        num_records=num_records,
        num_documents=len(documents),
        num_tokens=len(ids) - num_heldout,
        num_heldout_tokens=num_heldout,
    )


def map_shard(
    folder: Path, shard: TokenShard, vocab_size: int, verified: Verified
) -> tuple[np.ndarray, np.ndarray]:
    """Return a shard's token ids, (n,), and where its documents end, (d,), mapped from its file.

    Its bytes are read where they are touched, and all of them once, until it is verified.

    Raises:
        DamagedShards: If the file's bytes are not those that were written, or contradict the
            manifest or the vocabulary.
    """
    check_size(folder, shard)
    path, claims = folder / shard.file, (shard.sha256, vocab_size)
    is_verified = verified.holds(shard.file, *claims)
    if not is_verified and (found := sha256_of_file(path)) != shard.sha256:
        raise DamagedShards(
            f"{path} has sha256 {found}, the manifest says {shard.sha256}; {REMEDY}"
        )
    try:
        stored = load_file(path)
        dtypes = stored[TOKENS].dtype, stored[ENDS].dtype
    except (SafetensorError, KeyError) as error:
        raise DamagedShards(f"{path} is no shard of token ids ({error}); {REMEDY}") from error
    if dtypes not in ((torch.uint16, torch.int64), (torch.int32, torch.int64)):
        raise DamagedShards(f"{path} has fields of {dtypes}, which no shard has; {REMEDY}")
    ids, ends = stored[TOKENS].numpy(), stored[ENDS].numpy()
    num_tokens = shard.num_tokens + shard.num_heldout_tokens
    if ids.shape != (num_tokens,) or ends.shape != (shard.num_documents,) or ends[-1] != num_tokens:
        raise DamagedShards(f"{path} holds other tokens than the manifest says; {REMEDY}")
    if not is_verified:
        if (np.diff(ends, prepend=0) < 1).any() or not 0 <= ids.min() <= ids.max() < vocab_size:
            raise DamagedShards(f"{path} holds ids or documents that cannot be; {REMEDY}")
        verified.add(shard.file, *claims)
    return ids, ends


def check_size(folder: Path, shard: TokenShard) -> None:
    """Refuse a file that is missing, cut or longer than written."""
    path = folder / shard.file
    found = path.stat().st_size if path.is_file() else 0
    if found != shard.num_bytes:
        raise DamagedShards(
            f"{path} has {found} bytes, the manifest says {shard.num_bytes}; {REMEDY}"
        )


def write_manifest(folder: Path, manifest: TokenManifest) -> None:
    """Declare shards whole."""
    values = {"fingerprint": manifest.identity.fingerprint, **asdict(manifest)}
    write_json(folder / MANIFEST_FILE, values)


def read_manifest(folder: Path) -> TokenManifest:
    """Return the manifest of whole shards, checked against its own fingerprint.

    Raises:
        FileNotFoundError: If there is none.
        DamagedShards: If it was altered or is of another version.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {MANIFEST_FILE}: no token shards, or some that were cut short; run "
            "`qat tokenize`"
        )
    values = as_type(read_json(path), dict[str, Any], path, remedy=REMEDY, refuse=DamagedShards)
    recorded = values.pop("fingerprint", None)
    manifest = as_type(values, TokenManifest, path, remedy=REMEDY, refuse=DamagedShards)
    if recorded != manifest.identity.fingerprint:
        raise DamagedShards(
            f"{path}: fingerprint {recorded} is recorded but its fields give "
            f"{manifest.identity.fingerprint}; {REMEDY}"
        )
    if not manifest.shards:
        raise DamagedShards(f"{path}: shards is empty; {REMEDY}")
    return manifest


def read_identity(path: Path) -> TokenIdentity:
    """Return the identity in a file that a command left before its end."""
    return read_as(path, TokenIdentity, remedy=REMEDY, refuse=DamagedShards)


def require_identity(found: TokenIdentity, asked: TokenIdentity, folder: Path) -> None:
    """Refuse a folder of other shards than those to be written."""
    for field in fields(TokenIdentity):
        old, new = getattr(found, field.name), getattr(asked, field.name)
        if old != new:
            raise ValueError(
                f"{folder} holds shards with {field.name} {old}, asked for is {new}; choose "
                "another --output-dir or remove the folder"
            )
