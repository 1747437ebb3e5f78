"""Data sets and text files to blocks of token ids and loss masks.

records (`read_records`) -> texts (`render_records`) -> documents (`read_documents`) -> two sets of
blocks (`blocks_of_documents`). A record is one line of the data; its renderings, one for each
thinking mode, are documents that stay on the same side of the split.

Shape legend: N blocks, L tokens of a block.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qat.data.blocks import Blocks, Document, blocks_of_documents, take_tokens
from qat.data.chat import Rendering, render_records
from qat.data.config import LossOn, TextConfig
from qat.data.records import read_records, read_text
from qat.storage.decode import naming, reading
from qat.storage.files import canonical_json

TOKENIZER_HASH_VERSION = 2
RECORDS_A_CALL = 256  # documents given to the tokenizer at once: enough to feed its threads


def read_blocks(
    source: str, tokenizer: PreTrainedTokenizerBase, plan: TextConfig, *, is_whole: bool = False
) -> Blocks:
    """Return the blocks of a data source, train first, held-out last; see `pack_blocks`."""
    documents = read_documents(source, tokenizer, plan)
    if plan.num_sequences is not None:
        # One block more for each split, whose last partial block is dropped.
        documents = take_tokens(documents, (plan.num_sequences + 2) * plan.seq_len)
    separator = tokenizer.eos_token_id
    if separator is None:
        raise ValueError("this tokenizer has no eos_token; set it in tokenizer_config.json")
    bos = bos_id(tokenizer)
    return blocks_of_documents(list(documents), separator, plan, source, bos=bos, is_whole=is_whole)


def text_blocks(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, seq_len: int, limit: int | None = None
) -> Tensor:
    """Return a text file as `limit` blocks at most, (N, L) int64, BOS first where it is expected.

    BOS is context: it takes one of the L places, and the L - 1 tokens after it are predicted.
    """
    text = read_text(Path(path))
    if limit is not None:
        # Text has far fewer than 32 characters a token; what lies beyond need not be read.
        text = text[: limit * seq_len * 32]
    with reading(f"the tokenizer of {tokenizer.name_or_path}"):
        token_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = bos_id(tokenizer)
    num_new = seq_len if bos is None else seq_len - 1
    num_blocks = len(token_ids) // num_new
    if num_blocks == 0:
        raise ValueError(f"{path} has {len(token_ids)} tokens, less than one block of {seq_len}")
    num_blocks = num_blocks if limit is None else min(num_blocks, limit)
    blocks = torch.tensor(token_ids[: num_blocks * num_new]).view(num_blocks, num_new)
    return blocks if bos is None else nn.functional.pad(blocks, (1, 0), value=bos)


def read_documents(
    source: str, tokenizer: PreTrainedTokenizerBase, plan: TextConfig
) -> Iterator[Document]:
    """Yield the documents of a source in its order."""
    if plan.thinking != "none" and not tokenizer.chat_template:
        raise ValueError(
            f"--thinking {plan.thinking} needs a chat template and this tokenizer has none; "
            "pass --thinking none"
        )
    rendered, bos = render_records(read_records(source), tokenizer, plan), bos_id(tokenizer)
    with naming(source):
        while chunk := list(itertools.islice(rendered, RECORDS_A_CALL)):
            for document in tokenize(chunk, tokenizer, plan.loss_on):
                yield document if bos is None else begin_with(document, bos)


def tokenize(
    renderings: list[Rendering], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> Iterator[Document]:
    """Yield rendered texts as documents."""
    needs_offsets = loss_on == "assistant"
    if needs_offsets and not tokenizer.is_fast:
        raise ValueError("--loss-on assistant needs a fast tokenizer (tokenizer.json)")
    with reading(f"the tokenizer of {tokenizer.name_or_path}"):
        encoded = tokenizer(
            [rendering.text for rendering in renderings],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=needs_offsets,
            verbose=False,  # documents may be longer than the model's context; blocks are not
        )
    for position, (record, _, spans) in enumerate(renderings):
        token_ids = np.asarray(encoded["input_ids"][position], dtype=np.int32)
        is_counted = np.ones(len(token_ids), dtype=bool)
        if needs_offsets:
            starts = np.asarray(encoded["offset_mapping"][position])[:, 0]
            inside = [(starts >= first) & (starts < last) for first, last in spans]
            is_counted = np.any(inside, axis=0)
            if not is_counted.any():
                raise ValueError(
                    f"sample {record} has no counted token; remove it or pass --loss-on all"
                )
        yield Document(token_ids, is_counted, record)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the largest id of a tokenizer, some of which leave gaps between ids."""
    return max(len(tokenizer), *(place + 1 for place in tokenizer.get_vocab().values()))


def require_known_ids(token_ids: Iterable[int], vocab_size: int, tokenizer: str) -> None:
    """Refuse token ids that a model of a vocabulary has no embedding for."""
    ids = torch.as_tensor(token_ids)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(
            f"the tokenizer of {tokenizer} gives ids {int(ids.min())} .. {int(ids.max())}, the "
            f"model's vocabulary has {vocab_size}; use the model's own tokenizer"
        )


def begin_with(document: Document, bos: int) -> Document:
    """Return a document that starts with BOS; chat templates have often written it already."""
    if document.token_ids[:1].tolist() == [bos]:
        return document
    return Document(
        np.concatenate([np.array([bos], np.int32), document.token_ids]),
        np.concatenate([np.zeros(1, bool), document.is_counted]),
        document.record,
    )


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id that the tokenizer puts before every text, None where it puts none.

    What it does to an empty string decides: many have a `bos_token` that they never add.
    """
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else None


def tokenizer_sha256(
    tokenizer: PreTrainedTokenizerBase, version: int = TOKENIZER_HASH_VERSION
) -> str:
    """Return a hash of a tokenizer that survives saving and loading.

    Version 2 covers all that turns text into ids: normalizer, pre-tokenizer, merges, added tokens,
    post-processor. Version 1, of caches made by 0.1.0, covers the sorted vocabulary alone.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if version == 1:
        content = tokenizer.get_vocab()
    elif backend is not None:
        content = json.loads(backend.to_str())
        for volatile in ("version", "truncation", "padding"):  # calls change the last two
            content.pop(volatile, None)
    else:  # written in Python, or of another library
        content = [tokenizer.get_vocab(), tokenizer.all_special_ids, tokenizer("")["input_ids"]]
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()
