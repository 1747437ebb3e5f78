"""A tokenizer as the keys of a GGUF file: tokens, types, merges, and how text is split first.

Runtimes split text by a name (`pre`), not by the tokenizer's own rules, and a wrong name gives
other tokens without an error. The name is found by behaviour: the tokenizer and the splits that a
name stands for must cut a probe text alike.

Source: llama.cpp's llama-vocab.cpp for the splits of each name.
"""

import json
import re
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerFast

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # token types
NORMALIZERS = (None, "NFC")  # others change text in ways that runtimes do not know

# Splits applied one inside the other, in the grammar of the `regex` package.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SPLITS = {
    "gpt-2": (WORDS,),
    "smollm": (r"\p{N}", WORDS),
    "qwen2": (HEAD + r"\p{N}" + TAIL,),
    "llama-bpe": (HEAD + r"\p{N}{1,3}" + TAIL,),
}
IGNORES_MERGES = ("llama-bpe",)  # whole words that are tokens need no merges to be found
PROBE = (
    "I'LL say: it's 12345 o'clock,\tisn't\u00e4 it? \u00c9t\u00e9 2024!!\n\n  Zwei  Worte\r\n\n"
    "def f(x):\n    return x**2 # \u4f60\u597d\uff0c\u4e16\u754c 3\u00bd \U0001f680\U0001f680 "
    "we'Ve 'tis  ...\n \n\ta_b-c/d $1,000.50 \u0915\u094d\u0937 \u2028 end   "
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special_ids: dict[str, int] = field(default_factory=dict)
    """bos, eos, unk, pad to token ids, those that there are."""
    adds_bos: bool = False
    strips_after_control: bool = False
    """Whether white space after a control token belongs to it."""
    chat_template: str | None = None


def read_vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> Vocabulary:
    """Return a byte-level BPE tokenizer as GGUF keeps it; refuse another kind.

    The embedding has `vocab_size` rows; ids beyond the tokenizer's become unused tokens.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or "ByteLevel" not in str(state):
        raise ValueError(
            f"the tokenizer is {model['type']} without byte-level splits; gguf is written for "
            "byte-level BPE only: export --to hf and use the runtime's own converter"
        )
    normalizer = (state.get("normalizer") or {}).get("type")
    if normalizer not in NORMALIZERS:
        raise ValueError(f"the tokenizer's normalizer {normalizer} has no GGUF key; export --to hf")
    tokens, types = list_tokens(state, vocab_size)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    first = tokenizer("a").input_ids[:1]
    return Vocabulary(
        pre=find_pre(tokenizer, ignores_merges=bool(model.get("ignore_merges"))),
        tokens=tokens,
        types=types,
        merges=[m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        special_ids={name: index for name, index in ids.items() if index is not None},
        adds_bos=first == [tokenizer.bos_token_id],
        strips_after_control=any(t["rstrip"] and t["special"] for t in state["added_tokens"]),
        chat_template=tokenizer.chat_template,
    )


def list_tokens(state: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Return the text and the type of every row of the embedding."""
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    entries = {index: (text, NORMAL) for text, index in state["model"]["vocab"].items()}
    for added in state["added_tokens"]:
        kind = CONTROL if added["special"] else USER_DEFINED
        entries[added["id"]] = (added["content"], kind)
    if max(entries) >= vocab_size:
        raise ValueError(
            f"the tokenizer has id {max(entries)}, the embedding {vocab_size} rows; "
            "they are not of the same model"
        )
    for index, (text, kind) in entries.items():
        tokens[index], types[index] = text, kind
    return tokens, types


def find_pre(tokenizer: PreTrainedTokenizerFast, *, ignores_merges: bool) -> str:
    """Return the name of the splits that a tokenizer makes; refuse one that no name stands for."""
    backend = tokenizer.backend_tokenizer.pre_tokenizer
    ends = [end for _, (_, end) in backend.pre_tokenize_str(PROBE)] if backend else None
    for name in SPLITS:
        if ends == probe_ends(name) and ignores_merges == (name in IGNORES_MERGES):
            return name
    raise ValueError(
        f"the tokenizer has no known pre: it splits text unlike {', '.join(SPLITS)}; "
        "export --to hf and use the runtime's own converter"
    )


@cache
def probe_ends(name: str) -> list[int]:
    """Return where the pieces end into which a name's splits cut the probe text."""
    import regex

    pieces = [PROBE]
    for pattern in SPLITS[name]:
        pieces = [part for piece in pieces for part in split(regex.compile(pattern), piece)]
    return list(accumulate(map(len, pieces)))


def split(pattern: re.Pattern[str], text: str) -> list[str]:
    """Return a text's matches and what lies between them, in order."""
    pieces, position = [], 0
    for match in pattern.finditer(text):
        pieces += [text[position : match.start()], match.group()]
        position = match.end()
    return [piece for piece in [*pieces, text[position:]] if piece]
