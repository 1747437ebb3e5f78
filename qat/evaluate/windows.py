"""Perplexity of a long text, as the field measures it: windows that overlap, each token once.

A text of n tokens is read in windows of W tokens that start every S. Of each window those tokens
count that no earlier one has counted, but never its first, which is context. With S = W this is
the disjoint form that papers on quantization use; a smaller S gives every token more context.
BOS, where the tokenizer puts it, takes one place of each window. The last window ends where the
text ends.

Shape legend: n tokens of a text, N windows, W tokens of a window.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qat.evaluate.kl import LazyTeacher, Numbers, evaluate_batches
from qat.runtime.distributed import share

BATCH_TOKENS = 8192  # of a forward pass
JOINT = "\n\n"  # between the documents of a file


def cut_windows(
    token_ids: Tensor, window: int, stride: int, bos: int | None
) -> tuple[Tensor, Tensor]:
    """Return the windows of a text, (N, W) int64, and which next tokens count, (N, W - 1) bool.

    Args:
        token_ids: Of the text, (n,), without BOS.
        window: W; what a shorter text has where it has less.
        stride: S.
        bos: Put at the start of each window.

    Raises:
        ValueError: If a window holds no token that counts, or the stride leaves tokens out.
    """
    num_before = 0 if bos is None else 1
    size = min(window - num_before, len(token_ids))
    if size < 2:
        raise ValueError(
            f"--window {window} over {len(token_ids)} tokens leaves none to count; give more of "
            "either"
        )
    if not 1 <= stride <= window - num_before:
        raise ValueError(
            f"--stride {stride} must be within 1 and {window - num_before}, the tokens of a window"
        )
    last = len(token_ids) - size
    starts = torch.tensor([*range(0, last, stride), last])
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), starts[:-1] + size])  # counted before
    places = starts[:, None] + torch.arange(size)  # (N, size)
    counts = places >= ends[:, None]
    counts[:, 0] = False
    ids = token_ids[places]
    if bos is not None:
        ids = nn.functional.pad(ids, (1, 0), value=bos)
        counts = nn.functional.pad(counts, (1, 0))
    return ids, counts[:, 1:]


def perplexity_of_windows(
    model: nn.Module,
    ids: Tensor,
    counts: Tensor,
    *,
    device: torch.device,
    is_shared: bool = False,
) -> Numbers:
    """Return perplexity, its standard error over windows, and how many tokens it is of.

    `ids` and `counts` are those of `cut_windows`; the model is on the device, in eval mode. With
    `is_shared`, processes that work together measure a part each.
    """
    batch_size = max(1, BATCH_TOKENS // ids.shape[1])
    starts = range(0, len(ids), batch_size)

    def batches() -> Iterator[tuple[Tensor, LazyTeacher]]:
        for start in share(starts) if is_shared else starts:
            rows = slice(start, start + batch_size)
            yield ids[rows].to(device), LazyTeacher(counts[rows].to(device))

    values = evaluate_batches(model, batches(), description="perplexity", is_shared=is_shared)
    return {name: values[name] for name in ("perplexity", "perplexity_stderr", "tokens")}
