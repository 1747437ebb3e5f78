"""Reading token shards: memory-mapped, any block at once, checked shard by shard.

The training documents of all shards are one row of tokens, the held-out ones another. Block i of
L tokens starts at token i (L - 1): neighbours share one token, so that each token but the first is
predicted once.

Shape legend: B blocks of a batch, L tokens of a block, T = L - 1 positions.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qat.data.blocks import Blocks
from qat.data.token_shards import (
    TOKENIZER_FOLDER,
    TokenManifest,
    check_size,
    map_shard,
    read_manifest,
)
from qat.storage.receipt import Verified

Split = Literal["train", "heldout"]
MAPPED_BYTES = 1 << 30  # of shards at once: mapped pages that were read count as memory
CHUNK_ITEMS = 1 << 10  # neighbours that stay in one window
WINDOW_ITEMS = 1 << 18  # 256 chunks from anywhere: 2 MB of indices


class TokenBatch(NamedTuple):
    """Blocks of token ids."""

    token_ids: Tensor
    """(B, L) int64."""
    document_ids: Tensor
    """(B, L) int64; equal ids = the same document."""
    mask: Tensor
    """(B, T) bool; False where the next token begins another document, or does not count."""


class TokenDataset:
    """Whole shards: what they are, and any tokens of them."""

    def __init__(self, folder: Path, manifest: TokenManifest) -> None:
        """Join a folder and its manifest."""
        self.folder = folder
        self.manifest = manifest
        self._shards: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._verified = Verified(folder)
        self._first_documents = np.cumsum([0, *(one.num_documents for one in manifest.shards)])
        sizes = [(shard.num_tokens, shard.num_heldout_tokens) for shard in manifest.shards]
        self._ends = dict(zip(("train", "heldout"), np.cumsum(sizes, axis=0).T, strict=True))

    @classmethod
    def open(cls, folder: str | Path) -> "TokenDataset":
        """Open the shards in a folder.

        Raises:
            FileNotFoundError: If they are not whole.
            DamagedShards: If the manifest was altered or a file has another size.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        for shard in manifest.shards:
            check_size(folder, shard)
        return cls(folder, manifest)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name the shards."""
        return self.manifest.identity.fingerprint

    @property
    def tokenizer_folder(self) -> Path:
        """Return where the tokenizer is that made them."""
        return self.folder / TOKENIZER_FOLDER

    def num_tokens(self, split: Split) -> int:
        """Return the tokens of a split."""
        return int(self._ends[split][-1])

    def read(self, split: Split, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and document ids at places of a split's row, int64 in their shape.

        Raises:
            DamagedShards: If a shard is not the one that was written; its file is named.
            IndexError: If a place is outside the split.
        """
        if places.size and not (places.min() >= 0 and places.max() < self.num_tokens(split)):
            raise IndexError(f"{split} has tokens 0..{self.num_tokens(split) - 1}")
        ends = self._ends[split]
        owners = np.searchsorted(ends, places, side="right")
        token_ids, document_ids = np.empty_like(places), np.empty_like(places)
        for owner in np.unique(owners):
            shard, chosen = self.manifest.shards[owner], owners == owner
            size = shard.num_tokens if split == "train" else shard.num_heldout_tokens
            inside = places[chosen] - (ends[owner] - size)
            inside += 0 if split == "train" else shard.num_tokens
            stored, document_ends = self._shard(int(owner))
            token_ids[chosen] = stored[inside]
            found = np.searchsorted(document_ends, inside, side="right")
            document_ids[chosen] = self._first_documents[owner] + found
        return token_ids, document_ids

    def _shard(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Map a shard, after checking its bytes; those that were read longest ago make room."""
        if index not in self._shards:
            shards = self.manifest.shards
            self._shards[index] = map_shard(
                self.folder, shards[index], self.manifest.vocab_size, self._verified
            )
            mapped = sum(shards[one].num_bytes for one in self._shards)
            while mapped > MAPPED_BYTES and len(self._shards) > 1:
                mapped -= shards[self._shards.popitem(last=False)[0]].num_bytes
        self._shards.move_to_end(index)
        return self._shards[index]

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs, which maps shards of its own."""
        return {**self.__dict__, "_shards": OrderedDict()}


class TokenBlocks(torch.utils.data.Dataset[TokenBatch]):
    """The blocks of one length of a split, each found by its index alone."""

    def __init__(self, tokens: TokenDataset, split: Split, seq_len: int) -> None:
        """Look at a split as blocks.

        Raises:
            ValueError: If it holds no block of that length.
        """
        self.tokens, self.split, self.seq_len = tokens, split, seq_len
        if len(self) < 1:
            raise ValueError(
                f"{tokens.folder} has {tokens.num_tokens(split)} tokens in its {split} split, less "
                f"than one block of {seq_len}; tokenize more text, or choose a shorter length"
            )

    def __len__(self) -> int:
        return max(0, self.tokens.num_tokens(self.split) - 1) // (self.seq_len - 1)

    def __getitem__(self, index: int) -> TokenBatch:
        """Return one block as a batch of one."""
        return self.batch(np.array([range(len(self))[index]]))

    def __getitems__(self, indices: Sequence[int]) -> TokenBatch:
        """Return several blocks, as a `DataLoader` asks for a batch of them."""
        return self.batch(np.asarray(indices))

    def batch(self, indices: np.ndarray) -> TokenBatch:
        """Return the blocks of some indices, (B,), in their order."""
        places = indices[:, None] * (self.seq_len - 1) + np.arange(self.seq_len)  # (B, L)
        token_ids, document_ids = map(torch.from_numpy, self.tokens.read(self.split, places))
        return TokenBatch(token_ids, document_ids, document_ids[:, 1:] == document_ids[:, :-1])


class PackedBlocks(torch.utils.data.Dataset[TokenBatch]):
    """The blocks of a split that are in memory, as `TokenBlocks` gives those of shards."""

    def __init__(self, blocks: Blocks, split: Split) -> None:
        """Look at a split of packed records."""
        num_train = len(blocks) - blocks.num_heldout
        rows = slice(num_train) if split == "train" else slice(num_train, None)
        self.token_ids, self.document_ids = blocks.token_ids[rows], blocks.document_ids[rows]
        self.loss_mask = blocks.loss_mask[rows]
        self.seq_len = blocks.token_ids.shape[1]

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitems__(self, indices: Sequence[int]) -> TokenBatch:
        """Return several blocks, as a `DataLoader` asks for a batch of them."""
        return self.batch(np.asarray(indices))

    def batch(self, indices: np.ndarray) -> TokenBatch:
        """Return the blocks of some indices, (B,), in their order."""
        rows = torch.from_numpy(indices)
        token_ids, document_ids = self.token_ids[rows].long(), self.document_ids[rows].long()
        return TokenBatch(token_ids, document_ids, self.loss_mask[rows][:, 1:])


def shuffled_indices(
    num_items: int, batch_size: int, seed: list[int], start_batch: int = 0
) -> Iterator[np.ndarray]:
    """Yield batches of indices without end: epochs in an order of their own, one after the other.

    An epoch of many items is shuffled twice, first its chunks, then the items of each window of
    chunks: what lies near in time lies in few places, and no list is as long as the epoch.

    Batch b holds the places b * B to (b + 1) * B of the endless row of shuffled epochs, so any
    batch follows from its number and every item is seen equally often.

    Args:
        num_items: Items of an epoch.
        batch_size: B.
        seed: Decides the order, with the epoch's number.
        start_batch: The first to give, as if those before had been given.
    """

    @lru_cache(maxsize=2)
    def chunks(epoch: int) -> np.ndarray:
        order = np.random.default_rng([*seed, epoch]).permutation(num_items // CHUNK_ITEMS)
        return np.append(order, len(order))  # the last one may be shorter than the others

    @lru_cache(maxsize=2)
    def window(epoch: int, number: int) -> np.ndarray:
        if num_items <= WINDOW_ITEMS:
            return np.random.default_rng([*seed, epoch]).permutation(num_items)
        places = np.arange(number * WINDOW_ITEMS, min((number + 1) * WINDOW_ITEMS, num_items))
        items = chunks(epoch)[places // CHUNK_ITEMS] * CHUNK_ITEMS + places % CHUNK_ITEMS
        return np.random.default_rng([*seed, epoch, number]).permutation(items)

    for batch in count(start_batch):
        places = range(batch * batch_size, (batch + 1) * batch_size)
        epochs = (divmod(place, num_items) for place in places)
        found = ((epoch, *divmod(inside, WINDOW_ITEMS)) for epoch, inside in epochs)
        yield np.array([window(epoch, number)[place] for epoch, number, place in found])
