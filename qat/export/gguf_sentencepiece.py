"""SentencePiece vocabularies as runtimes read them: a score for each token, and how text begins.

Runtimes merge the two neighbours whose union has the best score (`llama`), or take the split of
the best sum (`t5`). A tokenizer of Hugging Face says the first by ranked pairs. Ranks become scores
exactly if every pair of tokens whose union is a token may merge; what is left, ties and white
space, is found by behaviour: the runtime's way and the tokenizer must cut a probe text alike.

Source: llama.cpp's llama-vocab.cpp, llm_tokenizer_spm_session and llm_tokenizer_ugm_session.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import heappop, heappush
from itertools import groupby

from transformers import PreTrainedTokenizerFast

from qat.export.gguf_family import REMEDY
from qat.tracking.messages import say

SPACE = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
UNKNOWN_PENALTY = 10.0  # below the least score, in runtimes as in the tokenizers package
Pieces = Callable[[str], list[int]]


def scores_of_merges(
    merges: Sequence[tuple[str, str]], vocabulary: Mapping[str, int], special: Iterable[str]
) -> dict[str, float]:
    """Return the scores of tokens that merges make, the earliest the highest.

    Args:
        merges: Pairs, the first to merge first.
        vocabulary: Token texts to ids.
        special: Texts that no merge makes or takes; they are cut out of a text before.

    Raises:
        ValueError: If two tokens may not merge although their union is a token.
    """
    allowed, texts = set(merges), vocabulary.keys() - set(special)
    for text in texts:
        for cut in range(1, len(text)):
            pair = (text[:cut], text[cut:])
            if pair[0] in texts and pair[1] in texts and pair not in allowed:
                raise ValueError(
                    f"the tokenizer never merges {pair[0]!r} and {pair[1]!r} into its token "
                    f"{text!r}, runtimes would: no SentencePiece model made it; {REMEDY}"
                )
    made = [text for text, _pairs in groupby(first + second for first, second in merges)]
    return {text: -float(place) for place, text in reversed(list(enumerate(made)))}


def space_prefix(
    tokenizer: PreTrainedTokenizerFast, pieces: Pieces, own_ids: Mapping[str, int], probe: str
) -> bool:
    """Return whether a space goes before a text; refuse a tokenizer that runtimes do not follow.

    Args:
        tokenizer: To follow.
        pieces: A runtime's way from a text with escaped spaces to token ids.
        own_ids: Tokens that are cut out of a text before, with their ids.
        probe: A text.
    """
    control = {} if tokenizer.eos_token is None else {tokenizer.eos_token: tokenizer.eos_token_id}
    cut_out = {**own_ids, **control}
    longest_first = sorted(cut_out, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def agree(text: str, prefix: str) -> bool:
        found, start = [], 0
        for match in [*pattern.finditer(text), None]:
            if part := text[start : match.start() if match else None]:
                found += pieces((prefix + part).replace(" ", SPACE))
            if match:
                found.append(cut_out[match.group()])
                start = match.end()
        return found == tokenizer(text, add_special_tokens=False).input_ids

    if agree(probe, ""):
        return False
    if not agree(probe, " "):
        raise ValueError(
            "runtimes cut text otherwise than this SentencePiece tokenizer (its normalizer or "
            f"pre-tokenizer has no GGUF key); {REMEDY}"
        )
    for text in (" a", "".join([*control, "a"])):
        if not agree(text, " "):
            say(f"runtimes put a space before the text of {text!r}, the tokenizer does not")
    return True


def merged_pieces(text: str, ids: Mapping[str, int], scores: Mapping[str, float]) -> list[int]:
    """Return token ids of a text by merging the best pair first, the left one of equals.

    Args:
        text: With escaped spaces.
        ids: Token texts to ids, the 256 bytes among them.
        scores: Of tokens that merges make.
    """
    parts: list[str | None] = list(text)
    after = [*range(1, len(parts)), None]
    before = [None, *range(len(parts) - 1)]
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int | None, right: int | None) -> None:
        if left is not None and right is not None:
            union = parts[left] + parts[right]
            if union in ids:
                heappush(queue, (-scores.get(union, 0.0), left, right, union))

    for right in range(1, len(parts)):
        offer(right - 1, right)
    while queue:
        _score, left, right, union = heappop(queue)
        if parts[left] is None or parts[right] is None or parts[left] + parts[right] != union:
            continue
        parts[left], parts[right] = union, None
        after[left] = after[right]
        if after[right] is not None:
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    found = []
    for part in filter(None, parts):
        found += [ids[part]] if part in ids else [ids[BYTES[byte]] for byte in part.encode()]
    return found


def best_pieces(text: str, ids: Mapping[str, int], scores: Mapping[str, float]) -> list[int]:
    """Return token ids of the split of a text whose scores have the largest sum.

    Args:
        text: With escaped spaces.
        ids: Token texts to ids; "" is the unknown token's.
        scores: Of tokens that a text may hold.
    """
    longest, unknown = max(map(len, scores)), min(scores.values()) - UNKNOWN_PENALTY
    best: list[tuple[float, int, int]] = [(0.0, 0, 0)]  # score, start and id of the last piece
    for end in range(1, len(text) + 1):
        options = []
        for start in range(max(0, end - longest), end):
            piece = text[start:end]
            if piece in scores:
                options.append((best[start][0] + scores[piece], start, ids[piece]))
        if text[end - 1] not in scores:
            options.append((best[end - 1][0] + unknown, end - 1, ids[""]))
        best.append(max(options, key=lambda option: option[0]))
    found, end = [], len(text)
    while end:
        _score, end, index = best[end]
        found.append(index)
    return [index for index, run in groupby(reversed(found)) for index in one_unknown(run, ids[""])]


def one_unknown(run: Iterable[int], unknown: int) -> list[int]:
    """Return a run of equal ids, shortened to one if it is of the unknown token."""
    run = list(run)
    return run[:1] if run[0] == unknown else run
