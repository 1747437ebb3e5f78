"""What a cache holds, in numbers, a decoded sample of it, and a picture."""

from dataclasses import dataclass, fields
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qat.cache.config import InspectCacheConfig
from qat.cache.read import TeacherCache
from qat.cache.summary import CacheSummary, plot_cache, summarize_cache, top_tokens
from qat.model.load import load_tokenizer
from qat.pipelines.open_cache import open_teacher_cache
from qat.tracking.messages import say

POSITIONS_SHOWN = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectCacheResult(CacheSummary):
    """What a cache holds, and where."""

    cache: Path
    """Its folder."""
    plot: Path | None
    """The picture."""


def inspect_cache(config: InspectCacheConfig) -> InspectCacheResult:
    """Show what a cache holds; its shards are checked on the way."""
    cache = open_teacher_cache(config.cache)
    if not 0 <= config.sequence < cache.num_sequences:
        raise ValueError(f"--sequence {config.sequence} is outside 0..{cache.num_sequences - 1}")
    tokenizer = load_tokenizer(config.teacher) if config.teacher else None
    if tokenizer is not None:
        cache.require_tokenizer(tokenizer)
    summary = summarize_cache(cache)
    values = {field.name: getattr(summary, field.name) for field in fields(summary)}
    for name, value in values.items():
        say(f"{name:<26}{value}")
    show_sample(cache, config.sequence, tokenizer)
    if config.plot:
        plot_cache(cache, config.plot)
    return InspectCacheResult(cache=cache.folder, plot=config.plot, **values)


def show_sample(
    cache: TeacherCache, sequence_id: int, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Show a sequence's first tokens, each with what the teacher expects after it."""

    def text_of(token_id: int) -> str:
        return str(token_id) if tokenizer is None else repr(tokenizer.decode([token_id]))

    input_ids, token_ids, probabilities = top_tokens(cache, sequence_id)
    if tokenizer is not None:
        say(f"sequence {sequence_id}: {tokenizer.decode(input_ids)!r}")
    for position in range(min(POSITIONS_SHOWN, len(token_ids))):
        pairs = zip(token_ids[position].tolist(), probabilities[position].tolist(), strict=True)
        expected = "  ".join(f"{text_of(token_id)} {share:.3f}" for token_id, share in pairs)
        say(f"  {text_of(input_ids[position].item()):>16} -> {expected}")
