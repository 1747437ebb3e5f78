"""Answers to prompts, in batches, from any Hugging Face causal LM.

Shape legend: B batch, T tokens of the longest prompt in it, N new tokens.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from qat.data.chat import apply_template, turns_of
from qat.data.records import Record, read_lines
from qat.data.text import require_known_ids
from qat.evaluate.generate_config import Template
from qat.storage.decode import Count, as_type, reading
from qat.storage.files import (
    canonical_json,
    fingerprint,
    folder_lock,
    parse_json,
    write_text,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A line of a part file."""

    row: Count
    output: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How answers are made."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    batch_size: int = 16
    template: Template = "chat"


def generate_texts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], decoding: Decoding
) -> Iterator[tuple[int, str]]:
    """Yield (position of the prompt, answer), batch by batch, prompts of similar length together.

    Long prompts go first, so that a batch that does not fit memory fails at once. A chat template,
    where used, makes each prompt the user's only turn. Temperature 0 is greedy, above it samples
    from torch's default generator.

    Raises:
        ValueError: If a prompt and its answer do not fit the model's context.
    """
    token_ids = [prompt_token_ids(tokenizer, prompt, decoding.template) for prompt in prompts]
    vocab_size = model.config.get_text_config().vocab_size
    for ids in token_ids:
        require_known_ids(ids, vocab_size, tokenizer.name_or_path)
    require_context(model, token_ids, decoding.max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda position: -len(token_ids[position]))
    with tqdm(total=len(prompts), desc="answers", unit="answer") as bar:
        for start in range(0, len(order), decoding.batch_size):
            positions = order[start : start + decoding.batch_size]
            new_ids = generate_batch(model, tokenizer, [token_ids[p] for p in positions], decoding)
            for position, answer in zip(positions, new_ids, strict=True):
                yield position, tokenizer.decode(answer, skip_special_tokens=True).strip()
            bar.update(len(positions))


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, template: Template
) -> list[int]:
    """Return the tokens that the answer follows."""
    if template == "none" or not tokenizer.chat_template:
        return tokenizer(prompt).input_ids
    turns = [{"role": "user", "content": prompt}]
    text = apply_template(tokenizer, turns, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def require_context(
    model: nn.Module, token_ids: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Refuse unless every prompt and its answer fit the model's context."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, token_ids), default=0) + max_new_tokens
    if limit is not None and longest > limit:
        raise ValueError(
            f"a prompt of {longest - max_new_tokens} tokens and {max_new_tokens} new ones exceed "
            f"the model's context of {limit}; shorten the prompt or lower --max-new-tokens"
        )


@torch.no_grad()
def generate_batch(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
) -> Tensor:
    """Return the new tokens of a batch, (B, N), padded behind each answer's end.

    Prompts are padded on the left and the padding is masked, so that an answer does not
    depend on what else is in the batch, up to rounding.
    """
    input_ids, attention_mask = pad_left(prompts, pad_token_id(model, tokenizer))  # (B, T) each
    sampling = {"temperature": decoding.temperature} if decoding.temperature > 0 else GREEDY
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        max_new_tokens=decoding.max_new_tokens,
        do_sample=decoding.temperature > 0,
        pad_token_id=pad_token_id(model, tokenizer),
        **sampling,
    )
    return output[:, input_ids.shape[1] :].cpu()  # (B, N)


# Sampling fields of a model's generation config, which greedy decoding warns about.
GREEDY = {"temperature": None, "top_p": None, "top_k": None}


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask, (B, T) int64, each prompt flush with the right end."""
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), pad_id)  # (B, T)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        attention_mask[row, longest - len(ids) :] = 1
    return input_ids, attention_mask


def pad_token_id(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token to pad with; any will do, as the mask hides it."""
    candidates = (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        model.config.get_text_config().eos_token_id,
    )
    known = [token for token in candidates if isinstance(token, int)]
    return known[0] if known else 0


def answer_file(
    data: Path,
    output: Path,
    answer: Callable[[list[str]], Iterable[tuple[int, str]]],
    *,
    settings: dict[str, Any],
    overwrite_outputs: bool = False,
) -> dict[str, int]:
    """Write the rows of an instruction file with their outputs filled in.

    The output file appears only when whole. Until then answers gather in a `.part.jsonl` next
    to it, which a later call with the same rows and settings continues.

    Args:
        data: JSON lines with instruction, input, output.
        output: May be the data file itself.
        answer: Yields (position, answer) for a list of prompts, in any order.
        settings: What decides the answers, JSON values; kept in the part file.
        overwrite_outputs: Answer every row, also those that have an output.

    Returns:
        Counts: rows, answered (in this call), kept (had an output), resumed (from the part file).

    Raises:
        ValueError: If a row is not of this form, the part file was begun otherwise, or another
            process answers into the same file.
    """
    rows = read_rows(data)
    if output.exists() and not output.samefile(data):
        raise ValueError(f"--output {output} exists; remove it or name another file")
    unanswered = [n for n, row in enumerate(rows) if overwrite_outputs or not row.get("output")]
    part = output.with_suffix(".part.jsonl")
    with reading(data, "correct that record"):
        prompts = [prompt_of(rows[n]) for n in unanswered]
    header = {"settings": settings, "rows": fingerprint(prompts)}
    with folder_lock(output):
        answers = read_part(part, header, unanswered)
        open_rows = [n for n in unanswered if n not in answers]
        resumed = len(answers)
        with part.open("a", encoding="utf-8") as file:
            for position, text in answer([prompt_of(rows[n]) for n in open_rows]):
                answers[open_rows[position]] = text
                line = {"row": open_rows[position], "output": text}
                file.write(canonical_json(line) + "\n")
                file.flush()
        for number, text in answers.items():
            rows[number] = {**rows[number], "output": text}
        write_text(output, "".join(json.dumps(row) + "\n" for row in rows))
        part.unlink()
    return {
        "rows": len(rows),
        "answered": len(open_rows),
        "kept": len(rows) - len(unanswered),
        "resumed": resumed,
    }


def prompt_of(row: Record) -> str:
    """Return what the user says in a row: the instruction, then its input."""
    return turns_of({"output": "", **row}, "alpaca")[0]["content"]


def read_rows(path: Path) -> list[Record]:
    """Return the rows of an instruction file; refuse one without rows or instructions."""
    if not path.is_file():
        raise FileNotFoundError(f"--data {path} is not a file; give JSON lines with instructions")
    rows = list(read_lines(path))
    for number, row in enumerate(rows, start=1):
        if not str(row.get("instruction", "")).strip():
            raise ValueError(f"{path} row {number} has no instruction; give it one or remove it")
        texts = [row["instruction"], row.get("input") or "", row.get("output") or ""]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path} row {number} has {texts}, which are no texts; correct it")
    if not rows:
        raise ValueError(f"{path} has no rows; give JSON lines with instruction, input, output")
    return rows


def read_part(part: Path, header: dict[str, Any], asked: Collection[int]) -> dict[int, str]:
    """Return the answers gathered so far by row number, of `asked`; begin the file if none is.

    A last line that an interruption cut short is dropped from the file.
    """
    lines = part.read_bytes().splitlines(keepends=True) if part.exists() else []
    whole, remedy = [line for line in lines if line.endswith(b"\n")], "remove that file"
    with reading(part, remedy):
        values = [parse_json(line) for line in whole]
    if values and values[0] != parse_json(canonical_json(header)):
        raise ValueError(
            f"{part} was begun for other rows or settings; remove it, or repeat what began it"
        )
    answers = [as_type(value, Answer, part, remedy=remedy) for value in values[1:]]
    write_text(part, b"".join(whole).decode() or canonical_json(header) + "\n")
    return {answer.row: answer.output for answer in answers if answer.row in asked}
