"""One source file to shards of token ids, from where an earlier process stopped."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from qat.data.chat import plain_texts
from qat.data.records import read_records
from qat.data.text import RECORDS_A_CALL, vocabulary_size
from qat.data.token_shards import (
    TokenIdentity,
    TokenShard,
    check_size,
    is_heldout,
    write_shard,
)
from qat.storage.decode import read_as, reading
from qat.storage.files import sha256_of_file, write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A file, or a hub data set, that becomes shards of its own."""

    name: str
    index: int
    """Its place in the data."""
    folder: Path
    """Of the shards."""
    identity: TokenIdentity

    @property
    def progress_file(self) -> Path:
        """Return where finished shards are written down."""
        return self.folder / f"progress_{self.index:05d}.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceProgress:
    """How far a source is."""

    complete: bool
    shards: tuple[TokenShard, ...]


def tokenize_source(source: Source, tokenizer: PreTrainedTokenizerBase) -> list[TokenShard]:
    """Write the shards of a source that are missing; return the entries of all.

    Records of finished shards are read and not tokenized again.
    """
    shards, is_complete = finished_shards(source)
    if is_complete:
        return shards
    plan, vocab_size = source.identity, vocabulary_size(tokenizer)
    num_read = sum(shard.num_records for shard in shards)
    texts = islice(plain_texts(read_records(source.name), plan.text_column), num_read, None)
    documents = tokenize_texts(texts, tokenizer, plan)
    while True:
        sides, num_records = gather(documents, plan.shard_tokens)
        if any(sides):
            path = source.folder / f"tokens_{source.index:05d}_{len(shards):05d}.safetensors"
            shards.append(
                write_shard(
                    path,
                    *sides,
                    vocab_size=vocab_size,
                    source=source.index,
                    num_records=num_records,
                )
            )
        is_complete = sum(map(len, (x for side in sides for x in side))) < plan.shard_tokens
        progress = SourceProgress(complete=is_complete, shards=tuple(shards))
        write_json(source.progress_file, asdict(progress))
        if is_complete:
            return shards


def finished_shards(source: Source) -> tuple[list[TokenShard], bool]:
    """Return the shards that an earlier process finished, and whether they are all.

    From the first one on that is not what was written, they are made again.
    """
    if not source.progress_file.is_file():
        return [], False
    progress = read_as(source.progress_file, SourceProgress, remedy="remove it")
    shards = list(progress.shards)
    for place, shard in enumerate(shards):
        try:
            check_size(source.folder, shard)
        except ValueError:
            return shards[:place], False
        if sha256_of_file(source.folder / shard.file) != shard.sha256:
            return shards[:place], False
    return shards, progress.complete


def gather(
    documents: Iterator[tuple[np.ndarray | None, bool]], num_tokens: int
) -> tuple[tuple[list[np.ndarray], list[np.ndarray]], int]:
    """Return training and held-out documents until they hold so many tokens, and their records."""
    train: list[np.ndarray] = []
    heldout: list[np.ndarray] = []
    num_records = total = 0
    while total < num_tokens and (item := next(documents, None)) is not None:
        document, is_out = item
        num_records += 1
        if document is not None:
            (heldout if is_out else train).append(document)
            total += len(document)
    return (train, heldout), num_records


def tokenize_texts(
    texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, plan: TokenIdentity
) -> Iterator[tuple[np.ndarray | None, bool]]:
    """Yield the document of each text, None of an empty one, and whether it is held out."""
    before = [] if plan.bos_id is None else [plan.bos_id]
    while chunk := list(islice(texts, RECORDS_A_CALL)):
        with reading(f"the tokenizer of {tokenizer.name_or_path}"):
            encoded = tokenizer(
                chunk, add_special_tokens=False, return_attention_mask=False, verbose=False
            )["input_ids"]
        for text, ids in zip(chunk, encoded, strict=True):
            is_empty = not text.strip()
            document = np.array([*before, *ids, plan.separator_id], np.int32)
            yield None if is_empty else document, is_heldout(text, plan.heldout_ratio)
