"""Perplexity on text files, each a domain of its own."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from qat.data.chat import plain_texts
from qat.data.records import read_records, source_name
from qat.data.text import bos_id
from qat.evaluate.kl import Numbers
from qat.evaluate.windows import JOINT, cut_windows, perplexity_of_windows
from qat.runtime.config import split_list

MOST_LETTERS = 16  # of a token, on average: English has four to five
# The texts that papers name, and of C4, which is larger than any of them reads, so many windows.
KNOWN = {
    "wikitext": ("Salesforce/wikitext:wikitext-2-raw-v1:test", None),
    "c4": ("allenai/c4:en:validation", 256),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PerplexityResult:
    """Perplexity of a model on texts, with the convention that it is measured by."""

    domains: dict[str, Numbers]
    """By name: perplexity, perplexity_stderr over windows, tokens that count."""
    window: int
    """Tokens of a window, BOS included; its first token is context."""
    stride: int
    """Tokens between the starts of windows; of each those count that no earlier one counted."""
    bos: bool
    """Whether each window starts with BOS."""
    joined_by: str
    """What is put between the documents of a file."""
    bits_per_weight: float | None
    """Of quantized layers."""
    bits_per_weight_mlp: float | None
    bits_per_weight_model: float | None


@dataclass(frozen=True, slots=True)
class Domain:
    """A text to measure on, cut into windows."""

    name: str
    ids: torch.Tensor
    """(N, W) int64."""
    counts: torch.Tensor
    """(N, W - 1) bool."""

    def measure(
        self, model: nn.Module, device: torch.device, *, is_shared: bool = False
    ) -> Numbers:
        """Return a model's numbers; it is on the device, in eval mode.

        With `is_shared`, processes that work together measure a part each.
        """
        return perplexity_of_windows(
            model, self.ids, self.counts, device=device, is_shared=is_shared
        )


def perplexities(
    domains: Iterable[Domain], model: nn.Module, device: torch.device, *, is_shared: bool
) -> dict[str, float]:
    """Return the perplexity of each domain by the name that a run records it under."""
    measured = {one.name: one.measure(model, device, is_shared=is_shared) for one in domains}
    return {f"{name}/perplexity": found["perplexity"] for name, found in measured.items()}


def read_domains(
    sources: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    stride: int,
    text_column: str = "text",
) -> list[Domain]:
    """Return the domains of sources, each given as NAME=SOURCE or SOURCE alone; commas part them.

    A source may be a name of `KNOWN`, and end in #COLUMN where its text is in another column.

    Raises:
        ValueError: If two have one name, or one has less than two tokens.
        FileNotFoundError: If there is no such source.
    """
    domains: dict[str, Domain] = {}
    for given in split_list(sources):
        name, source = named_source(given)
        if name in domains:
            raise ValueError(f"two texts are called {name}; name them as NAME=FILE")
        source, most_windows = KNOWN.get(source, (source, None))
        most = None if most_windows is None else most_windows * window
        place, column = split_column(source, text_column)
        text = JOINT.join(first_of(plain_texts(read_records(place), column), most))
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:most]
        try:
            windows = cut_windows(torch.tensor(found), window, stride, bos_id(tokenizer))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        domains[name] = Domain(name, *windows)
    return list(domains.values())


def named_source(given: str) -> tuple[str, str]:
    """Return name and source of a text; a path's last part without its ending names it."""
    name, is_named, source = given.partition("=")
    if is_named and not Path(given).exists():
        return name, source
    if given in KNOWN:
        return given, given
    return Path(source_name(split_column(given, "")[0])).stem, given


def split_column(source: str, usual: str) -> tuple[str, str]:
    """Return a source without the #COLUMN at its end, and the column; the usual one without."""
    place, _, column = source.rpartition("#")
    return (source, usual) if not place or Path(source).exists() else (place, column)


def first_of(texts: Iterable[str], most_tokens: int | None) -> Iterator[str]:
    """Yield texts until they surely hold so many tokens; all of them without a bound."""
    left = math.inf if most_tokens is None else MOST_LETTERS * most_tokens
    for text in texts:
        yield text
        left -= len(text)
        if left <= 0:
            return
