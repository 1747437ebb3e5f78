"""Data sets and chat templates to blocks of token ids and loss masks.

records (`read_records`) -> documents (`read_documents`) -> two sets (`split_documents`)
-> blocks (`pack_blocks`). A record is one line of the data; its renderings, one for each
thinking mode, are documents that stay on the same side of the split.

Models that were trained with BOS before every text (Gemma, Llama 3, Mistral) find it where they
expect it: at the start of every document, and of every block, where one is cut in two.

Shape legend: N blocks, L tokens of a block.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from qat.data.records import TEXT_SUFFIXES, Record, read_records, read_text, source_files

Format = Literal["alpaca", "sharegpt", "messages", "dolly", "text"]
Thinking = Literal["none", "false", "true", "both", "all"]
LossOn = Literal["all", "assistant"]
Turn = dict[str, str]

# In the order of the caches of the first generation: both is off then on.
RENDERINGS: dict[Thinking, tuple[Thinking, ...]] = {
    "none": ("none",),
    "false": ("false",),
    "true": ("true",),
    "both": ("false", "true"),
    "all": ("true", "false", "none"),
}
FIELDS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "dolly": ("instruction", "response"),
    "text": ("text",),
}
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
KNOWN_ROLES = ("system", "user", "assistant", "tool", "developer")
THINK_SPAN = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
COLUMN_DTYPES = (torch.int32, torch.bool, torch.int32)  # of token ids, loss mask, document ids
RECORDS_A_CALL = 256  # documents given to the tokenizer at once: enough to feed its threads


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

    def __len__(self) -> int:
        return self.token_ids.shape[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPlan:
    """How records become blocks."""

    seq_len: int
    """Tokens a block."""
    format: Format | Literal["auto"] = "auto"
    """What the records' fields mean; auto looks at the first record."""
    thinking: Thinking = "none"
    """Chat template's enable_thinking; none joins the contents without a template."""
    loss_on: LossOn = "all"
    """Which tokens count."""
    num_sequences: int | None = None
    """Blocks at most, train and held-out together; all when not given."""
    heldout_ratio: float = 0.125
    """Share of the blocks that is held out."""
    seed: int = 0
    """Which documents are held out."""


def read_blocks(source: str, tokenizer: Any, plan: TextPlan) -> Blocks:
    """Return the blocks of a data source, train first, held-out last.

    Raises:
        ValueError: If the source, its fields or the template cannot be used, or too few
            tokens come out for one block.
        FileNotFoundError: If the source is a path that is not there.
    """
    documents = read_documents(source, tokenizer, plan)
    if plan.num_sequences is not None:
        # One block more for each split, whose last partial block is dropped.
        documents = take_tokens(documents, (plan.num_sequences + 2) * plan.seq_len)
    separator, bos = eos_id(tokenizer), bos_id(tokenizer)
    return blocks_of_documents(list(documents), separator, plan, source, bos=bos)


def blocks_of_documents(
    documents: list[Document],
    separator: int,
    plan: TextPlan,
    source: str = "the data",
    *,
    bos: int | None = None,
) -> Blocks:
    """Split documents in two, pack each set, keep at most `plan.num_sequences` blocks.

    Args:
        documents: In order.
        separator: As in `pack_blocks`.
        plan: Length, number and split of the blocks.
        source: Name of the data, for the error message.
        bos: As in `pack_blocks`.
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
    heldout_blocks = pack_blocks(heldout, plan.seq_len, separator, bos)
    train_blocks = pack_blocks(train, plan.seq_len, separator, bos)
    num_heldout = min(num_heldout, len(heldout_blocks))
    num_train = len(train_blocks)
    if plan.num_sequences is not None:
        num_train = min(num_train, plan.num_sequences - num_heldout)
    return join_blocks(train_blocks, num_train, heldout_blocks, num_heldout)


def text_blocks(path: str, tokenizer: Any, seq_len: int, limit: int | None = None) -> Tensor:
    """Return a plain text file as blocks, (N, L) int64, each after BOS where the model expects it.

    BOS is context: it takes one of the L places, and the L - 1 tokens after it are predicted.

    Args:
        path: UTF-8 text file.
        tokenizer: Of the model that will read the blocks.
        seq_len: L.
        limit: N at most.
    """
    text = read_text(Path(path))
    if limit is not None:
        # Text has far fewer than 32 characters a token; what lies beyond need not be read.
        text = text[: limit * seq_len * 32]
    token_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = bos_id(tokenizer)
    num_new = seq_len if bos is None else seq_len - 1
    num_blocks = len(token_ids) // num_new
    if num_blocks == 0:
        raise ValueError(f"{path} has {len(token_ids)} tokens, less than one block of {seq_len}")
    num_blocks = num_blocks if limit is None else min(num_blocks, limit)
    blocks = torch.tensor(token_ids[: num_blocks * num_new]).view(num_blocks, num_new)
    return blocks if bos is None else nn.functional.pad(blocks, (1, 0), value=bos)


# Records to rendered text.


def detect_format(record: Record) -> Format:
    """Return the format whose fields a record has."""
    for name, fields in FIELDS.items():
        if all(field in record for field in fields):
            return name
    raise ValueError(
        f"--format auto knows no format with the fields {', '.join(map(str, record))}; "
        "rename them or give --format"
    )


def turns_of(record: Record, kind: Format) -> list[Turn]:
    """Return a record's turns, roles as chat templates name them."""
    if kind == "messages":
        return [turn(item["role"], item["content"]) for item in record["messages"]]
    if kind == "sharegpt":
        return [turn(item["from"], item["value"]) for item in record["conversations"]]
    if kind == "text":
        return [turn("user", record["text"])]
    extra, answer = ("input", "output") if kind == "alpaca" else ("context", "response")
    question = "\n\n".join(part for part in (record["instruction"], record.get(extra)) if part)
    return [turn("user", question), turn("assistant", record[answer])]


def turn(role: str, content: Any) -> Turn:
    """Return one turn; content in parts is joined."""
    role = ROLES.get(role, role)
    if role not in KNOWN_ROLES:
        raise ValueError(f"role {role!r} is not one of {', '.join((*KNOWN_ROLES, *ROLES))}")
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    return {"role": role, "content": content or ""}


def render(turns: list[Turn], tokenizer: Any, thinking: Thinking, *, prompt: bool = False) -> str:
    """Return turns as one text.

    Args:
        turns: In order.
        tokenizer: Its chat template is used unless thinking is "none".
        thinking: "none", "false" or "true".
        prompt: Open the assistant's turn at the end.
    """
    if thinking == "none":
        return "\n\n".join(item["content"] for item in turns if item["content"])
    text = tokenizer.apply_chat_template(
        turns,
        tokenize=False,
        enable_thinking=thinking == "true",
        add_generation_prompt=prompt,
    )
    # Templates write an empty span into answers whatever enable_thinking says.
    return text if thinking == "true" else THINK_SPAN.sub("", text)


def ignores_thinking(tokenizer: Any) -> bool:
    """Whether the chat template gives the same text with thinking on and off."""
    turns = [turn("user", "a"), turn("assistant", "b")]
    return all(
        render(turns[:count], tokenizer, "true", prompt=count == 1)
        == render(turns[:count], tokenizer, "false", prompt=count == 1)
        for count in (1, 2)
    )


def assistant_spans(
    turns: list[Turn], tokenizer: Any, thinking: Thinking, text: str
) -> list[tuple[int, int]]:
    """Return the character spans of `text` that the assistant says, its end token included.

    Each is the difference between the conversation before the turn and after it. Where a
    template rewrites earlier turns, as Qwen3's does, the turn's own content is looked up.
    """
    spans, cursor = [], 0
    for index, item in enumerate(turns):
        if item["role"] != "assistant" or not item["content"].strip():
            continue
        before, after = turn_ends(turns, index, tokenizer, thinking)
        start = len(before) if text.startswith(before) else cursor
        if not text.startswith(after):
            said = spoken_part(item["content"], text[start:], after)
            if not said:
                continue
            start = text.index(said, start)
            ending = after[after.rindex(said) + len(said) :]
            said += ending if text.startswith(ending, start + len(said)) else ""
            after = text[:start] + said
        spans.append((start, len(after)))
        cursor = len(after)
    return spans


def spoken_part(content: str, *texts: str) -> str:
    """Return a turn's content as all texts hold it: whole, or without its thoughts; or nothing."""
    for said in (content.strip(), THINK_SPAN.sub("", content).strip()):
        if all(said in text for text in texts):
            return said
    return ""


def turn_ends(turns: list[Turn], index: int, tokenizer: Any, thinking: Thinking) -> tuple[str, str]:
    """Return the text before a turn and the text up to its end."""
    after = render(turns[: index + 1], tokenizer, thinking)
    if thinking == "none":
        return after[: len(after) - len(turns[index]["content"])], after
    return render(turns[:index], tokenizer, thinking, prompt=True), after


# Text to tokens.


def read_documents(source: str, tokenizer: Any, plan: TextPlan) -> Iterator[Document]:
    """Yield the documents of a source in its order."""
    if plan.thinking != "none" and not tokenizer.chat_template:
        raise ValueError(
            f"--thinking {plan.thinking} needs a chat template and this tokenizer has none; "
            "pass --thinking none"
        )
    rendered, bos = render_records(read_records(source), tokenizer, plan), bos_id(tokenizer)
    while chunk := list(itertools.islice(rendered, RECORDS_A_CALL)):
        for document in tokenize(chunk, tokenizer, plan.loss_on):
            yield document if bos is None else begin_with(document, bos)


def render_records(
    records: Iterable[Record], tokenizer: Any, plan: TextPlan
) -> Iterator[tuple[int, str, list[tuple[int, int]]]]:
    """Yield record index, text and counted spans of each rendering; equal ones once."""
    kind = plan.format
    for index, record in enumerate(records):
        kind = detect_format(record) if kind == "auto" else kind
        try:
            turns = turns_of(record, kind)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"sample {index} is not of --format {kind}: {error!r}") from error
        seen = set()
        for thinking in RENDERINGS[plan.thinking]:
            text = render(turns, tokenizer, thinking)
            if text in seen or not text.strip():
                continue
            seen.add(text)
            spans = [(0, len(text))]
            if plan.loss_on == "assistant":
                spans = assistant_spans(turns, tokenizer, thinking, text)
            if not spans:
                raise ValueError(
                    f"sample {index} has no counted token; remove it or pass --loss-on all"
                )
            yield index, text, spans


def tokenize(
    rendered: list[tuple[int, str, list[tuple[int, int]]]], tokenizer: Any, loss_on: LossOn
) -> Iterator[Document]:
    """Yield rendered texts as documents."""
    wants_offsets = loss_on == "assistant"
    if wants_offsets and not tokenizer.is_fast:
        raise ValueError("--loss-on assistant needs a fast tokenizer (tokenizer.json)")
    encoded = tokenizer(
        [text for _, text, _ in rendered],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=wants_offsets,
        verbose=False,  # documents may be longer than the model's context; blocks are not
    )
    for position, (record, _, spans) in enumerate(rendered):
        token_ids = np.asarray(encoded["input_ids"][position], dtype=np.int32)
        is_counted = np.ones(len(token_ids), dtype=bool)
        if wants_offsets:
            is_counted = inside_spans(np.asarray(encoded["offset_mapping"][position]), spans)
            if not is_counted.any():
                raise ValueError(
                    f"sample {record} has no counted token; remove it or pass --loss-on all"
                )
        yield Document(token_ids, is_counted, record)


def inside_spans(offsets: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """Return which tokens begin inside a span.

    Args:
        offsets: (n, 2) character offsets of the tokens.
        spans: Start and end characters.

    Returns:
        (n,) bool.
    """
    starts = offsets[:, 0]
    inside = np.zeros(len(offsets), dtype=bool)
    for first, last in spans:
        inside |= (starts >= first) & (starts < last)
    return inside


def begin_with(document: Document, bos: int) -> Document:
    """Return a document that starts with BOS; chat templates have often written it already."""
    if document.token_ids[:1].tolist() == [bos]:
        return document
    return Document(
        np.concatenate([np.array([bos], np.int32), document.token_ids]),
        np.concatenate([np.zeros(1, bool), document.is_counted]),
        document.record,
    )


def bos_id(tokenizer: Any) -> int | None:
    """Return the id that the tokenizer puts before every text, None where it puts none.

    What it does to an empty string decides: many have a `bos_token` that they never add.
    """
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else None


def holds_one_document(source: str) -> bool:
    """Whether a data source is a single plain text file."""
    files = source_files(source)
    return len(files) == 1 and files[0].suffix in TEXT_SUFFIXES


def eos_id(tokenizer: Any) -> int:
    """Return the id that ends a document."""
    if tokenizer.eos_token_id is None:
        raise ValueError("this tokenizer has no eos_token; set it in tokenizer_config.json")
    return tokenizer.eos_token_id


# Documents to blocks.


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
    lengths: dict[int, int] = {}
    for document in documents:
        lengths[document.record] = lengths.get(document.record, 0) + len(document.token_ids) + 1
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
    documents: list[Document], seq_len: int, separator: int, bos: int | None = None
) -> Blocks:
    """Join documents, one separator after each, and cut them into blocks.

    The last partial block is dropped, and so are blocks in which no predicted token counts. A
    document's first token does not count: what comes before it belongs to another document.

    Args:
        documents: In order.
        seq_len: L.
        separator: Token id, EOS as a rule. It counts where its document's last token does.
        bos: Put at the start of each block that does not begin with it.

    Returns:
        Blocks whose document ids number the given documents.
    """
    if not documents:
        return Blocks(*(torch.zeros(0, seq_len, dtype=kind) for kind in COLUMN_DTYPES))
    end = np.array([separator], np.int32)
    token_ids = np.concatenate([x for item in documents for x in (item.token_ids, end)])
    is_counted = np.concatenate(
        [x for item in documents for x in (item.is_counted, item.is_counted[-1:])]
    )
    sizes = np.array([len(document.token_ids) + 1 for document in documents])
    is_counted[np.cumsum(sizes) - sizes] = False
    document_ids = np.repeat(np.arange(len(documents), dtype=np.int32), sizes)
    starts, is_begun = block_starts(token_ids, seq_len, bos)
    places = starts[:, None] + np.arange(seq_len) - ~is_begun[:, None]  # (N, L)
    places[:, 0] = starts
    columns = [torch.from_numpy(x[places]) for x in (token_ids, is_counted, document_ids)]
    if bos is not None:
        columns[0][:, 0] = bos
    keeps = columns[1][:, 1:].any(dim=1)  # the first token of a block is never predicted
    return Blocks(*(column[keeps] for column in columns))


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
    )
