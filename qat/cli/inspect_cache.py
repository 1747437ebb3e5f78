"""`qat inspect-cache`: what a cache holds, a decoded sample of it, and a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from qat.cli.command import run_command
from qat.tracking.messages import say

POSITIONS_SHOWN = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectCacheConfig:
    """Show what a cache holds; its shards are checked on the way."""

    cache: Positional[Path]
    """The cache's folder, of our form or of the seeds'."""
    teacher: str | None = None
    """Folder or hub name whose tokenizer decodes the sample; ids are shown without it."""
    sequence: int = 0
    """The sequence that is shown."""
    plot: Path | None = None
    """Image file for tail mass, probability by rank and bytes by field."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat inspect-cache", InspectCacheConfig, inspect, argv)


def inspect(config: InspectCacheConfig) -> dict[str, Any]:
    """Look at the cache; return the closing values."""
    from qat.cache.summary import plot_cache, summarize_cache
    from qat.model.load import load_tokenizer
    from qat.pipelines.open_cache import open_teacher_cache

    cache = open_teacher_cache(config.cache)
    if not 0 <= config.sequence < cache.num_sequences:
        raise ValueError(f"--sequence {config.sequence} is outside 0..{cache.num_sequences - 1}")
    tokenizer = load_tokenizer(config.teacher) if config.teacher else None
    if tokenizer is not None:
        cache.require_tokenizer(tokenizer)
    summary = summarize_cache(cache)
    for name, value in summary.items():
        say(f"{name:<26}{value}")
    show_sample(cache, config.sequence, tokenizer)
    if config.plot:
        plot_cache(cache, config.plot)
    return {"cache": str(cache.folder), **summary, "plot": config.plot and str(config.plot)}


def show_sample(cache: Any, sequence_id: int, tokenizer: Any) -> None:
    """Tell a sequence's first tokens, each with what the teacher expected after it."""
    from qat.cache.summary import top_tokens

    def word(token_id: int) -> str:
        return str(token_id) if tokenizer is None else repr(tokenizer.decode([token_id]))

    input_ids, token_ids, probabilities = top_tokens(cache, sequence_id)
    if tokenizer is not None:
        say(f"sequence {sequence_id}: {tokenizer.decode(input_ids)!r}")
    for position in range(min(POSITIONS_SHOWN, len(token_ids))):
        pairs = zip(token_ids[position].tolist(), probabilities[position].tolist(), strict=True)
        expected = "  ".join(f"{word(token_id)} {share:.3f}" for token_id, share in pairs)
        say(f"  {word(input_ids[position].item()):>16} -> {expected}")


if __name__ == "__main__":
    raise SystemExit(main())
