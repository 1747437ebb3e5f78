"""Documents to blocks: split in two by record, joined, cut into blocks of one length.

Models that were trained with BOS before every text (Gemma, Llama 3, Mistral) find it where they
expect it: at the start of every document, and of every block, where one is cut in two.

Shape legend: N blocks, L tokens of a block.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qat.data.config import TextConfig


@dataclass(frozen=True, slots=True)
class Document:
    """One rendered text as tokens."""

    token_ids: np.ndarray
    """(n,) int32."""
    is_counted: np.ndarray
    """(n,) bool; True = a loss may ask for this token."""
    record: int
    """Index of its record in the data."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Packed text: N blocks of L tokens, the held-out ones last."""

    token_ids: Tensor
    """(N, L) int32."""
    loss_mask: Tensor
    """(N, L) bool; True = the token counts when it is predicted."""
    document_ids: Tensor
    """(N, L) int32; equal ids = the same document."""
    num_heldout: int = 0
    num_cut: int = 0
    """Documents that were to stay whole and are longer than a block."""

    def __len__(self) -> int:
        return self.token_ids.shape[0]


def blocks_of_documents(
    documents: list[Document],
    separator: int,
    plan: TextConfig,
    source: str = "the data",
    *,
    bos: int | None = None,
    is_whole: bool = False,
) -> Blocks:
    """Split documents in two, pack each set, keep at most `plan.num_sequences` blocks.

    `separator`, `bos` and `is_whole` are those of `pack_blocks`; `source` names the data in the
    error message.
    """
    num_tokens = sum(len(document.token_ids) + 1 for document in documents)
    num_blocks = num_tokens // plan.seq_len
    if plan.num_sequences is not None:
        num_blocks = min(num_blocks, plan.num_sequences)
    if num_blocks == 0:
        raise ValueError(
            f"{source} gives {num_tokens} tokens, less than one block; choose --seq-len below"
        )
    num_heldout = count_heldout(num_blocks, plan.heldout_ratio)
    train, heldout = split_documents(documents, num_heldout * plan.seq_len, plan.seed)
    heldout_blocks = pack_blocks(heldout, plan.seq_len, separator, bos, is_whole=is_whole)
    train_blocks = pack_blocks(train, plan.seq_len, separator, bos, is_whole=is_whole)
    num_heldout = min(num_heldout, len(heldout_blocks))
    num_train = len(train_blocks)
    if plan.num_sequences is not None:
        num_train = min(num_train, plan.num_sequences - num_heldout)
    return join_blocks(train_blocks, num_train, heldout_blocks, num_heldout)


def set_aside(blocks: Blocks, count: int) -> tuple[Blocks, Blocks]:
    """Return blocks without `count` training blocks, and those; both are spread over the text.

    At least one training block stays, where there is one.
    """
    num_train = len(blocks) - blocks.num_heldout
    num_kept = max(min(1, num_train), num_train - count)
    is_kept = torch.ones(len(blocks), dtype=torch.bool)
    is_kept[:num_train] = False
    is_kept[torch.arange(num_kept) * num_train // max(1, num_kept)] = True
    columns = (blocks.token_ids, blocks.loss_mask, blocks.document_ids)
    kept, others = ([column[rows] for column in columns] for rows in (is_kept, ~is_kept))
    return Blocks(*kept, blocks.num_heldout), Blocks(*others)


def take_tokens(documents: Iterable[Document], num_tokens: int) -> Iterator[Document]:
    """Yield documents until their tokens reach a number; whole records only."""
    total, record = 0, -1
    for document in documents:
        if total >= num_tokens and document.record != record:
            return
        total, record = total + len(document.token_ids) + 1, document.record
        yield document


def count_heldout(num_blocks: int, ratio: float) -> int:
    """Return how many blocks to hold out: their share, at least one of eight or more."""
    if ratio == 0 or num_blocks < 8:
        return 0
    return min(num_blocks - 1, max(1, round(num_blocks * ratio)))


def split_documents(
    documents: list[Document], heldout_tokens: int, seed: int
) -> tuple[list[Document], list[Document]]:
    """Return train and held-out documents, whole records on one side.

    Records are drawn by seed until they hold `heldout_tokens`; one that would overshoot by half
    is passed over. What is missing then, as in a data set of one long text, is cut from the end
    of the longest document.
    """
    lengths: Counter[int] = Counter()
    for document in documents:
        lengths[document.record] += len(document.token_ids) + 1
    chosen, total = set(), 0
    for record in np.random.default_rng(seed).permutation(list(lengths)).tolist():
        if total >= heldout_tokens:
            break
        if total + lengths[record] <= 1.5 * heldout_tokens:
            chosen.add(record)
            total += lengths[record]
    train = [document for document in documents if document.record not in chosen]
    heldout = [document for document in documents if document.record in chosen]
    if total < heldout_tokens:
        train, tail = cut_longest(train, heldout_tokens - total)
        heldout.append(tail)
    return train, heldout


def cut_longest(documents: list[Document], num_tokens: int) -> tuple[list[Document], Document]:
    """Return documents without the last tokens of the longest one, and those tokens."""
    longest = max(range(len(documents)), key=lambda index: len(documents[index].token_ids))
    whole = documents[longest]
    cut = max(0, len(whole.token_ids) - num_tokens)
    head = Document(whole.token_ids[:cut], whole.is_counted[:cut], whole.record)
    tail = Document(whole.token_ids[cut:], whole.is_counted[cut:], whole.record)
    rest = [*documents[:longest], head, *documents[longest + 1 :]]
    return [document for document in rest if len(document.token_ids)], tail


def pack_blocks(
    documents: list[Document],
    seq_len: int,
    separator: int,
    bos: int | None = None,
    *,
    is_whole: bool = False,
) -> Blocks:
    """Join documents, one separator after each, and cut them into blocks.

    The last partial block is dropped, and so are blocks in which no predicted token counts. A
    document's first token does not count: what comes before it belongs to another document.
    Where documents stay whole, one that does not fit a block's rest begins the next, separators
    that do not count fill the rest, and of one that is longer than a block the end is left out.

    Args:
        documents: In this order; the blocks' document ids number them.
        seq_len: L.
        separator: Token id, EOS as a rule. It counts where its document's last token does.
        bos: Put at the start of each block that does not begin with it.
        is_whole: Whether no document is cut in two.
    """
    num_cut = 0
    if is_whole:
        num_cut = sum(len(document.token_ids) >= seq_len for document in documents)
        documents = [begin_of(document, seq_len - 1) for document in documents]
    if not documents:
        dtypes = (torch.int32, torch.bool, torch.int32)
        return Blocks(*(torch.zeros(0, seq_len, dtype=dtype) for dtype in dtypes))
    sizes = np.array([len(document.token_ids) + 1 for document in documents])
    rests = rests_of_blocks(sizes, seq_len) if is_whole else np.zeros_like(sizes)
    token_ids, is_counted = [], []
    for document, rest in zip(documents, rests.tolist(), strict=True):
        token_ids += [document.token_ids, np.full(1 + rest, separator, np.int32)]
        is_counted += [document.is_counted, document.is_counted[-1:], np.zeros(rest, bool)]
    token_ids, is_counted = np.concatenate(token_ids), np.concatenate(is_counted)
    sizes += rests
    is_counted[np.cumsum(sizes) - sizes] = False
    document_ids = np.repeat(np.arange(len(documents), dtype=np.int32), sizes)
    starts, is_begun = block_starts(token_ids, seq_len, bos)
    places = starts[:, None] + np.arange(seq_len) - ~is_begun[:, None]  # (N, L)
    places[:, 0] = starts
    columns = [torch.from_numpy(x[places]) for x in (token_ids, is_counted, document_ids)]
    if bos is not None:
        columns[0][:, 0] = bos
    keeps = columns[1][:, 1:].any(dim=1)  # the first token of a block is never predicted
    return Blocks(*(column[keeps] for column in columns), num_cut=num_cut)


def begin_of(document: Document, num_tokens: int) -> Document:
    """Return a document without what comes after a number of its tokens."""
    if len(document.token_ids) <= num_tokens:
        return document
    token_ids, is_counted = document.token_ids[:num_tokens], document.is_counted[:num_tokens]
    return Document(token_ids, is_counted, document.record)


def rests_of_blocks(sizes: np.ndarray, seq_len: int) -> np.ndarray:
    """Return what has to follow each document, (N,), for none to cross the end of a block."""
    rests, place = np.zeros_like(sizes), 0
    for number, size in enumerate(sizes.tolist()):
        if place + size > seq_len:
            rests[number - 1] = seq_len - place
            place = 0
        place += size
    rests[-1] = seq_len - place
    return rests


def block_starts(
    token_ids: np.ndarray, seq_len: int, bos: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return where each block's first token is taken, (N,), and whether BOS need not be added."""
    if bos is None:
        starts = np.arange(len(token_ids) // seq_len) * seq_len
        return starts, np.ones(len(starts), bool)
    is_bos = token_ids == bos
    starts, place = [], 0
    while place < len(token_ids) and place + seq_len - (not is_bos[place]) <= len(token_ids):
        starts.append(place)
        place += seq_len - int(not is_bos[place])
    starts = np.array(starts, np.int64)
    return starts, is_bos[starts]


def join_blocks(train: Blocks, num_train: int, heldout: Blocks, num_heldout: int) -> Blocks:
    """Return the first blocks of two sets as one; held-out document ids follow the train ones."""
    shift = int(train.document_ids.max()) + 1 if len(train) else 0
    return Blocks(
        torch.cat([train.token_ids[:num_train], heldout.token_ids[:num_heldout]]),
        torch.cat([train.loss_mask[:num_train], heldout.loss_mask[:num_heldout]]),
        torch.cat([train.document_ids[:num_train], heldout.document_ids[:num_heldout] + shift]),
        num_heldout,
        train.num_cut + heldout.num_cut,
    )
