"""A model measured on token shards: perplexity of their held-out documents."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from qat.data.token_dataset import PackedBlocks, TokenBlocks
from qat.evaluate.kl import LazyTeacher, Numbers, evaluate_batches
from qat.runtime.distributed import share

BATCH_TOKENS = 8192  # of a forward pass


def evaluate_on_tokens(
    model: nn.Module,
    blocks: TokenBlocks | PackedBlocks,
    *,
    device: torch.device,
    num_sequences: int,
    is_separate: bool,
) -> Numbers:
    """Return perplexity and its standard error over blocks that are spread evenly.

    Processes that work together measure a part each.

    Args:
        model: A causal LM on the device, in eval mode.
        blocks: Of a split.
        device: Where the batches go.
        num_sequences: Blocks at most.
        is_separate: Whether documents in one block do not attend to each other.
    """
    count = min(num_sequences, len(blocks))
    chosen = np.arange(count) * len(blocks) // count
    batch_size = max(1, BATCH_TOKENS // blocks.seq_len)

    def batches() -> Iterator[tuple]:
        for start in share(range(0, count, batch_size)):
            batch = blocks.batch(chosen[start : start + batch_size])
            token_ids, document_ids, mask = (ids.to(device) for ids in batch)
            yield token_ids, LazyTeacher(mask), document_ids if is_separate else None

    values = evaluate_batches(model, batches(), description="evaluate", is_shared=True)
    names = ("perplexity", "perplexity_stderr", "tokens")
    return {name: values[name] for name in names}
