"""Reading a cache: memory-mapped, any sequence at once, checked shard by shard.

Shape legend: N sequences of a cache, B of a batch, L tokens of a block, T = L - 1 positions.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from qat.cache.codec import Fields, unpack, unpack_hidden
from qat.cache.fields import check_head, check_shard, check_text
from qat.cache.manifest import (
    MANIFEST_FILE,
    CacheManifest,
    CacheMismatch,
    FileEntry,
    read_manifest,
    require_equal,
    template_sha256,
    tokenizer_sha256,
)
from qat.cache.shard import check_sha256, check_size, read_fields
from qat.distill.teacher import TeacherSignal, dense_signal
from qat.model.head import scale_logits
from qat.runtime.device import lay_out
from qat.storage.addresses import as_address
from qat.storage.read_through import ReadThrough

Split = Literal["train", "heldout", "all"]
# Stored with the content for whoever asks `fields` for them; no loss does.
UNUSED_FIELDS = ("negative_ids", "negative_log_probs", "negative_logits")
MAPPED_BYTES = 1 << 30  # of shards at once: mapped pages that were read count as memory


@dataclass(frozen=True)
class CacheBatch:
    """Blocks and the teacher's signal on them, unpacked on first use.

    Fields are a few times smaller than the signal, of hidden states hundreds of times: moved to
    the device before they are unpacked, they need less transfer, and the head runs there.
    """

    input_ids: Tensor
    """(B, L) int64."""
    document_ids: Tensor | None
    """(B, L) int64; None where the documents of a block are one text to the teacher."""
    mask: Tensor
    """(B, T) bool; True = the position counts."""
    fields: Fields
    """What the cache keeps of each position, (B, T, ...)."""
    to_logits: Callable[[Fields], Tensor]
    """From the fields of hidden states to logits, (B, T, V)."""

    @cached_property
    def signal(self) -> TeacherSignal:
        """The teacher on the L - 1 positions that predict a token."""
        if "hidden" in self.fields:
            return dense_signal(self.to_logits(self.fields), self.mask)
        return unpack(self.fields, self.mask)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "CacheBatch":
        """Return the same batch on another device, its sequences spread over that one's chips."""

        def move(tensor: Tensor) -> Tensor:
            return lay_out(tensor.to(device, non_blocking=non_blocking), split=True)

        return CacheBatch(
            move(self.input_ids),
            None if self.document_ids is None else move(self.document_ids),
            move(self.mask),
            {name: move(field) for name, field in self.fields.items()},
            self.to_logits,
        )


class TeacherCache:
    """A whole cache: what it is, and batches of any of its sequences."""

    def __init__(
        self,
        folder: Path,
        manifest: CacheManifest,
        load_shard: Callable[[Path], Fields],
        source: ReadThrough | None = None,
    ) -> None:
        """Join a manifest and the function that maps one of its shards.

        Where the cache lies at an address, `source` brings its files into the folder.
        """
        self.folder, self.source = folder, source
        self.manifest = manifest
        self._load_shard = load_shard
        self._head_fields: dict[torch.device, Fields] = {}
        self._shards: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()
        self._whole: set[str] = set()  # files whose bytes and content were checked
        self._names: set[str] = set()
        self._id_limit = manifest.vocab_size
        self._ends = np.cumsum([shard.num_sequences for shard in manifest.shards])

    @classmethod
    def open(cls, path: str | Path) -> "TeacherCache":
        """Open a native cache, also where it is nested in a folder, or lies at an address.

        Raises:
            FileNotFoundError: If there is no whole cache.
            CacheMismatch: If its manifest was altered or a shard has another size.
        """
        if address := as_address(path):
            source = ReadThrough(address)
            source.path(MANIFEST_FILE)
            return cls(source.folder, read_manifest(source.folder), read_fields, source)
        folder = find_cache_folder(Path(path))
        manifest = read_manifest(folder)
        for entry in manifest.shards:
            check_size(folder, entry)
        for entry in filter(None, (manifest.head, manifest.text)):
            check_size(folder, entry)
        return cls(folder, manifest, read_fields)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name the cache."""
        return self.manifest.fingerprint

    @property
    def num_sequences(self) -> int:
        """N, train and held-out."""
        return self.manifest.num_sequences

    @property
    def seq_len(self) -> int:
        """L."""
        return self.manifest.identity.seq_len

    @property
    def vocab_size(self) -> int | None:
        """Width of the teacher's logits; None where an old cache does not say."""
        return self.manifest.vocab_size

    def sequence_ids(self, split: Split = "all") -> np.ndarray:
        """Return the ids of a split's sequences, int64, in order."""
        num_train = self.num_sequences - self.manifest.num_heldout
        bounds = {
            "train": (0, num_train),
            "heldout": (num_train, self.num_sequences),
            "all": (0, self.num_sequences),
        }
        if split not in bounds:
            raise ValueError(f"split {split!r} is not one of {', '.join(bounds)}")
        sequence_ids = np.arange(*bounds[split], dtype=np.int64)
        if not len(sequence_ids):
            raise ValueError(f"{self.folder} has no {split} sequences; build it with more text")
        return sequence_ids

    @property
    def num_text(self) -> int:
        """Sequences that are not held out, read by the teacher or not."""
        further = self.manifest.text.num_sequences if self.manifest.text else 0
        return self.num_sequences - self.manifest.num_heldout + further

    def spread_text(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Return token ids and document ids (or None) of so many sequences, (N, L) int64 each.

        They are spread evenly over all text that is not held out; all of it if there is less.
        """
        num_read, count = len(self.sequence_ids("train")), min(count, self.num_text)
        chosen = np.arange(count) * self.num_text // count
        parts = [self.fields(chosen[chosen < num_read])]
        if self.manifest.text:
            path = self._path(self.manifest.text)
            text = read_fields(path)
            check_text(path, text, self.manifest)
            rows = chosen[chosen >= num_read] - num_read
            parts.append({name: torch.from_numpy(x.numpy()[rows]) for name, x in text.items()})
        ids = torch.cat([part["input_ids"].long() for part in parts])
        if self.manifest.identity.documents == "joined":
            return ids, None
        return ids, torch.cat([part["document_ids"].long() for part in parts])

    def spread_ids(self, count: int) -> np.ndarray:
        """Return the ids of so many training sequences, spread evenly over all text; all if fewer.

        Sequences that follow each other are of one document or chapter.
        """
        chosen = self.sequence_ids("train")
        count = min(count, len(chosen))
        return chosen[np.arange(count) * len(chosen) // count]

    def batch(self, sequence_ids: np.ndarray | list[int]) -> CacheBatch:
        """Return the given sequences, in the given order.

        Raises:
            CacheMismatch: If a shard is not the one that was written; its file is named.
            IndexError: If an id is outside the cache.
        """
        fields = self.fields(sequence_ids)
        mask = fields.pop("loss_mask")[:, 1:].bool()
        input_ids = fields.pop("input_ids").long()
        documents = fields.pop("document_ids", None)
        used = {name: field for name, field in fields.items() if name not in UNUSED_FIELDS}
        is_separate = self.manifest.identity.documents == "separate"
        documents = documents.long() if is_separate else None
        return CacheBatch(input_ids, documents, mask, used, self._logits)

    def fields(self, sequence_ids: np.ndarray | list[int]) -> Fields:
        """Return the stored fields of sequences, (B, ...); ids as int32."""
        rows = np.asarray(sequence_ids, dtype=np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < self.num_sequences):
            raise IndexError(f"sequence ids {rows} reach outside 0..{self.num_sequences - 1}")
        owners = np.searchsorted(self._ends, rows, side="right")
        gathered: dict[str, np.ndarray] = {}
        for owner in np.unique(owners):
            places = np.flatnonzero(owners == owner)
            start = self._ends[owner] - self.manifest.shards[owner].num_sequences
            for name, column in self._shard(int(owner)).items():
                part = column[rows[places] - start]
                if name not in gathered:
                    gathered[name] = np.empty((len(rows), *part.shape[1:]), part.dtype)
                gathered[name][places] = part
        return {
            name: torch.from_numpy(column.astype(np.int32) if column.dtype == np.uint16 else column)
            for name, column in gathered.items()
        }

    def seen_tokens(self, vocab_size: int) -> Tensor:
        """Return which tokens the training sequences hold, (V,) bool."""
        seen, first = np.zeros(vocab_size, dtype=bool), 0
        num_train = self.num_sequences - self.manifest.num_heldout
        for index, entry in enumerate(self.manifest.shards):
            seen[np.unique(self._shard(index)["input_ids"][: max(0, num_train - first)])] = True
            first += entry.num_sequences
        return torch.from_numpy(seen)

    def stored_bytes(self) -> dict[str, int]:
        """Return the bytes that each field takes in the first shard."""
        return {name: column.nbytes for name, column in self._shard(0).items()}

    def _shard(self, index: int) -> dict[str, np.ndarray]:
        """Map a shard, after checking its bytes and what they stand for; old maps make room."""
        if index not in self._shards:
            entry = self.manifest.shards[index]
            is_known, path = entry.file in self._whole, self._path(entry)
            fields = self._load_shard(path)
            if not is_known:
                self._check(path, fields, entry)
            self._shards[index] = {name: field.numpy() for name, field in fields.items()}
            mapped = sum(self.manifest.shards[one].num_bytes for one in self._shards)
            while mapped > MAPPED_BYTES and len(self._shards) > 1:
                mapped -= self.manifest.shards[self._shards.popitem(last=False)[0]].num_bytes
        self._shards.move_to_end(index)
        return self._shards[index]

    def _check(self, path: Path, fields: Fields, entry: FileEntry) -> None:
        """Refuse a shard that contradicts the manifest, or has other fields than the first."""
        check_shard(path, fields, entry, self.manifest, self._id_limit)
        self._names = self._names or set(fields)
        if fields.keys() != self._names:
            raise CacheMismatch(
                f"{path} has the fields {', '.join(sorted(fields))}, other shards "
                f"{', '.join(sorted(self._names))}; fetch or build the cache again"
            )

    def _path(self, entry: FileEntry) -> Path:
        """Return where a file is, whose bytes are those that were written."""
        if self.source:
            path = self.source.path(entry.file, entry.sha256)
        else:
            path = self.folder / entry.file
            if entry.file not in self._whole:
                check_sha256(self.folder, entry)
        self._whole.add(entry.file)
        return path

    def _logits(self, fields: Fields) -> Tensor:
        """Return the logits, (B, T, V), that stored hidden states lead to, where they are."""
        device = fields["hidden"].device
        if device not in self._head_fields:
            path = self._path(self.manifest.head)
            head = read_fields(path)
            check_head(path, head, self.vocab_size, fields["hidden"].shape[-1])
            self._head_fields[device] = {n: field.to(device).float() for n, field in head.items()}
        stored = self._head_fields[device]
        hidden = unpack_hidden(fields, stored["channel_scale"])
        logits = functional.linear(hidden, stored["weight"], stored.get("bias"))
        return scale_logits(logits, stored.get("factor"), stored.get("softcap"))

    def require_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer, or a chat template, other than the teacher's."""
        identity = self.manifest.identity
        remedy = "use the teacher's tokenizer, or build a cache with this one"
        given = tokenizer_sha256(tokenizer, identity.tokenizer_hash_version)
        require_equal(identity.tokenizer_sha256, given, "tokenizer_sha256", remedy)
        given = template_sha256(tokenizer)
        require_equal(identity.template_sha256, given, "template_sha256", remedy)

    def require_vocabulary(self, vocab_size: int) -> None:
        """Refuse a model whose logits are narrower or wider than the teacher's.

        Where a cache does not say, its ids are bounded by the model's when they are read.
        """
        remedy = "use a student of the same vocabulary"
        require_equal(self.vocab_size, vocab_size, "vocab_size", remedy)
        self._id_limit = vocab_size

    def require_teacher(self, weights: str) -> None:
        """Refuse a cache of another teacher; `model_identity` gives the hash of its weights."""
        recorded = self.manifest.identity.teacher_weights
        require_equal(recorded, weights, "teacher_weights", "build a cache with this teacher")


def is_native(folder: Path) -> bool:
    """Whether a folder holds a native cache."""
    return (folder / MANIFEST_FILE).is_file()


def find_cache_folder(path: Path, is_cache: Callable[[Path], bool] = is_native) -> Path:
    """Return the folder that holds a cache's files: `path`, or one nested in it."""
    folder = path
    while folder.is_dir():
        if is_cache(folder):
            return folder
        inner = [item for item in folder.iterdir() if item.is_dir()]
        if len(inner) != 1:
            break
        folder = inner[0]
    if not path.is_dir():
        raise FileNotFoundError(f"cache {path} does not exist; `qat build-cache` makes one")
    raise FileNotFoundError(
        f"{path} holds neither {MANIFEST_FILE} nor meta.json and shards: no cache, or one whose "
        "build was cut short; run its `qat build-cache` again"
    )


def shuffled_batches(
    cache: TeacherCache,
    *,
    split: Split = "train",
    batch_size: int,
    seed: int,
    start_batch: int = 0,
    share: Callable[[range], range] = lambda places: places,
) -> Iterator[CacheBatch]:
    """Yield batches without end: epochs in an order of their own, one after the other.

    Batch b holds the places b * B to (b + 1) * B of the endless row of shuffled epochs, so any
    batch follows from its number and every sequence is seen equally often.

    `start_batch` is the first to give, as if those before had been given; `share` takes what is
    given of each batch.
    """
    sequence_ids = cache.sequence_ids(split)

    @lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(sequence_ids)

    for batch in count(start_batch):
        places = share(range(batch * batch_size, (batch + 1) * batch_size))
        epochs = (divmod(place, len(sequence_ids)) for place in places)
        yield cache.batch(np.array([order(epoch)[inside] for epoch, inside in epochs]))
