"""A tokenizer as the keys of a GGUF file: tokens, types, merges or scores, and how text is split.

Runtimes split text for byte-level BPE by a name (`pre`), not by the tokenizer's own rules, and a
wrong name gives other tokens without an error. The name is found by behaviour: the tokenizer and
the splits that a name stands for must cut a probe text alike. What SentencePiece made has no such
splits (`gguf_sentencepiece`).

Source: llama.cpp's llama-vocab.cpp for the splits of each name.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerFast

from qat.export.gguf_family import REMEDY
from qat.export.gguf_sentencepiece import (
    BYTES,
    SPACE,
    best_pieces,
    merged_pieces,
    scores_of_merges,
    space_prefix,
)
from qat.tracking.messages import say

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types
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
    "dbrx": (HEAD + r"\p{N}{1,3}" + TAIL,),
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

    model: str
    """gpt2 for byte-level BPE, llama for SentencePiece's BPE, t5 for its unigrams."""
    pre: str = "default"
    """How byte-level BPE splits text first."""
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    """Of byte-level BPE."""
    scores: list[float] = field(default_factory=list)
    """Of the others, one a token."""
    special_ids: dict[str, int] = field(default_factory=dict)
    """bos, eos, unk, pad to token ids, those that there are."""
    adds_bos: bool = False
    adds_eos: bool = False
    adds_space: bool = False
    """Whether a text begins with a space that it does not have."""
    strips_after_control: bool = False
    """Whether white space after a control token belongs to it."""
    chat_template: str | None = None


def read_vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> Vocabulary:
    """Return a tokenizer as GGUF keeps it; refuse one that runtimes do not follow.

    The embedding has `vocab_size` rows; ids beyond the tokenizer's become unused tokens.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    readers = {
        ("BPE", False): read_byte_level,
        ("BPE", True): read_sentencepiece,
        ("Unigram", False): read_sentencepiece,
        ("Unigram", True): read_sentencepiece,
    }
    kind = state["model"]["type"], bool(state["model"].get("byte_fallback"))
    if kind not in readers:
        raise ValueError(
            f"the tokenizer is {kind[0]} with byte_fallback={kind[1]}; gguf is written for BPE "
            f"and for unigrams: {REMEDY}"
        )
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    around = tokenizer("a").input_ids
    return replace(
        readers[kind](tokenizer, state, vocab_size),
        special_ids={name: index for name, index in ids.items() if index is not None},
        adds_bos=around[:1] == [tokenizer.bos_token_id],
        adds_eos=around[-1:] == [tokenizer.eos_token_id],
        strips_after_control=any(t["rstrip"] and t["special"] for t in state["added_tokens"]),
        chat_template=tokenizer.chat_template,
    )


def read_byte_level(
    tokenizer: PreTrainedTokenizerFast, state: dict[str, Any], vocab_size: int
) -> Vocabulary:
    """Return what a file says of byte-level BPE."""
    model = state["model"]
    if "ByteLevel" not in str(state):
        raise ValueError(
            "the tokenizer is BPE without byte-level splits and without byte_fallback, which no "
            f"runtime follows: {REMEDY}"
        )
    normalizer = (state.get("normalizer") or {}).get("type")
    if normalizer not in NORMALIZERS:
        raise ValueError(f"the tokenizer's normalizer {normalizer} has no GGUF key; {REMEDY}")
    tokens, types = list_tokens(state, model["vocab"], vocab_size)
    return Vocabulary(
        model="gpt2",
        pre=find_pre(tokenizer, ignores_merges=bool(model.get("ignore_merges"))),
        tokens=tokens,
        types=types,
        merges=[m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
    )


def read_sentencepiece(
    tokenizer: PreTrainedTokenizerFast, state: dict[str, Any], vocab_size: int
) -> Vocabulary:
    """Return what a file says of SentencePiece's BPE, or of its unigrams."""
    model, added = state["model"], {token["content"]: token for token in state["added_tokens"]}
    probe = PROBE
    if model["type"] == "BPE":
        ids = model["vocab"]
        if missing := set(BYTES) - ids.keys():
            raise ValueError(f"the tokenizer lacks the byte token {min(missing)}; {REMEDY}")
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        special = {text for text, token in added.items() if token["special"]}
        scores = scores_of_merges(merges, ids, special)
        pieces = partial(merged_pieces, ids=ids, scores=scores)
    else:
        scores = dict(model["vocab"])
        ids = {text: index for index, text in enumerate(scores)}
        usual = {text: score for text, score in scores.items() if text not in added}
        if model.get("byte_fallback"):
            usual = {text: score for text, score in usual.items() if text not in BYTES}
            probe = "".join(c for c in PROBE if c.replace(" ", SPACE) in usual)
            say("runtimes read an unknown character as <unk>, the tokenizer as bytes")
        pieces = partial(best_pieces, ids=ids | {"": model["unk_id"]}, scores=usual)
    tokens, types = list_tokens(state, ids, vocab_size)
    own = {tokens[index]: index for index, kind in enumerate(types) if kind == USER_DEFINED}
    least = min(scores.values(), default=0.0)
    return Vocabulary(
        model="llama" if model["type"] == "BPE" else "t5",
        tokens=tokens,
        types=types,
        scores=[
            scores.get(text, least if kind == UNUSED else 0.0)
            for text, kind in zip(tokens, types, strict=True)
        ],
        adds_space=space_prefix(tokenizer, pieces, own, probe),
    )


def list_tokens(
    state: dict[str, Any], ids: Mapping[str, int], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Return the text and the type of every row of the embedding."""
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    entries = {index: (text, NORMAL) for text, index in ids.items()}
    if state["model"].get("byte_fallback"):
        entries |= {ids[text]: (text, BYTE) for text in BYTES}
    for added in state["added_tokens"]:
        text, kind = added["content"], CONTROL if added["special"] else USER_DEFINED
        if kind == USER_DEFINED and added["normalized"]:  # runtimes seek it in the text as given
            text = text.replace(SPACE, " ")
        entries[added["id"]] = (text, kind)
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
        f"the tokenizer has no known pre: it splits text unlike {', '.join(SPLITS)}; {REMEDY}"
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
