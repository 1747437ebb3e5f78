"""Records of a data set to texts: formats, turns, chat templates, what the assistant says."""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from qat.data.config import Format, TextConfig, Thinking
from qat.data.records import Record
from qat.storage.decode import reading

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


class Rendering(NamedTuple):
    """A record as one text."""

    record: int
    """Its index in the data."""
    text: str
    spans: list[tuple[int, int]]
    """Characters whose tokens count."""


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


def turn(role: str, content: str | list[dict[str, str]] | None) -> Turn:
    """Return one turn; content in parts is joined."""
    role = ROLES.get(role, role)
    if role not in KNOWN_ROLES:
        raise ValueError(f"role {role!r} is not one of {', '.join((*KNOWN_ROLES, *ROLES))}")
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"content {content!r} is no text")
    return {"role": role, "content": content or ""}


def render(
    turns: list[Turn],
    tokenizer: PreTrainedTokenizerBase,
    thinking: Thinking,
    *,
    prompt: bool = False,
) -> str:
    """Return turns as one text; `prompt` opens the assistant's turn at the end."""
    if thinking == "none":
        return "\n\n".join(item["content"] for item in turns if item["content"])
    text = apply_template(
        tokenizer, turns, enable_thinking=thinking == "true", add_generation_prompt=prompt
    )
    # Templates write an empty span into answers whatever enable_thinking says.
    return text if thinking == "true" else THINK_SPAN.sub("", text)


def apply_template(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], **settings: bool) -> str:
    """Return turns as the tokenizer's chat template writes them; transformers runs it in a sandbox.

    Raises:
        ValueError: If the template is none, or fails on these turns.
    """
    where = f"the chat template of {tokenizer.name_or_path}"
    with reading(where, "correct it, or pass --thinking none or --template none"):
        named = tokenizer.chat_template  # a text, or several of them by name
        for template in named.values() if isinstance(named, dict) else [named]:
            require_no_powers(str(template))
        return tokenizer.apply_chat_template(turns, tokenize=False, **settings)


@cache
def require_no_powers(template: str) -> None:
    """Refuse a template that raises numbers to powers: no text needs one, and one fills a memory.

    The sandbox bounds loops, not numbers.
    """
    from jinja2 import Environment

    if any(sign == "**" for _, kind, sign in Environment().lex(template) if kind == "operator"):
        raise ValueError("it has the operator **")


def plain_texts(records: Iterable[Record], column: str) -> Iterator[str]:
    """Yield the text of each record: its field `column`, or what its format joins to one.

    Raises:
        ValueError: If a record has neither, or the field holds no text; names the record.
    """
    for index, record in enumerate(records):
        if column in record:
            text = record[column] or ""
            if not isinstance(text, str):
                raise ValueError(
                    f"record {index}: {column} {text!r} is not text; give another --text-column"
                )
            yield text
            continue
        kind = next((k for k, own in FIELDS.items() if all(f in record for f in own)), None)
        if kind is None:
            raise ValueError(
                f"record {index} has the fields {', '.join(map(str, record))}; give the one that "
                "holds text with --text-column"
            )
        try:
            turns = turns_of(record, kind)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"record {index} looks like {kind} and is not ({error!r}); correct it, or give "
                "--text-column"
            ) from error
        yield "\n\n".join(item["content"] for item in turns if item["content"])


def ignores_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template gives the same text with thinking on and off."""
    turns = [turn("user", "a"), turn("assistant", "b")]
    return all(
        render(turns[:count], tokenizer, "true", prompt=count == 1)
        == render(turns[:count], tokenizer, "false", prompt=count == 1)
        for count in (1, 2)
    )


def render_records(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, plan: TextConfig
) -> Iterator[Rendering]:
    """Yield the renderings of records; equal ones of a record once."""
    kind = plan.format
    for index, record in enumerate(records):
        kind = detect_format(record) if kind == "auto" else kind
        try:
            turns = turns_of(record, kind)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"sample {index} is not of --format {kind} ({error!r}); correct or remove it, or "
                "give its --format"
            ) from error
        seen = set()
        for thinking in RENDERINGS[plan.thinking]:
            text = render(turns, tokenizer, thinking)
            if text in seen or not text.strip():
                continue
            seen.add(text)
            spans = [(0, len(text))]
            if plan.loss_on == "assistant":
                spans = assistant_spans(turns, tokenizer, thinking, text)
            yield Rendering(index, text, spans)


def assistant_spans(
    turns: list[Turn], tokenizer: PreTrainedTokenizerBase, thinking: Thinking, text: str
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


def turn_ends(
    turns: list[Turn], index: int, tokenizer: PreTrainedTokenizerBase, thinking: Thinking
) -> tuple[str, str]:
    """Return the text before a turn and the text up to its end."""
    after = render(turns[: index + 1], tokenizer, thinking)
    if thinking == "none":
        return after[: len(after) - len(turns[index]["content"])], after
    return render(turns[:index], tokenizer, thinking, prompt=True), after
