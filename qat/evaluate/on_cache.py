"""A student measured on a cache: the held-out split where there is one."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from qat.cache.read import TeacherCache
from qat.distill.teacher import TeacherSignal
from qat.evaluate.kl import evaluate_batches
from qat.model.surgery import hold_weights

KD_SEQUENCES = 40  # the seeds' habit: their loss is the mean over the first 40


def evaluate_on_cache(
    model: nn.Module,
    cache: TeacherCache,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_sequences: int | None = None,
    batch_size: int = 16,
) -> dict[str, float | int | None]:
    """Return kl_nats, kd_loss, perplexity, its error, top1_agreement and tokens.

    On a cache of the seeds, kd_loss is theirs: over its first sequences, whatever is held out.

    Args:
        model: On the device; quantized weights are formed once, and stay held.
        cache: The teacher's word; a cache without a held-out split is measured as a whole.
        device: Where the batches go.
        dtype: Compute dtype.
        num_sequences: At most so many; all when not given.
        batch_size: Sequences of a forward pass.
    """
    split = "heldout" if cache.manifest.num_heldout else "all"
    sequence_ids = cache.sequence_ids(split)[:num_sequences]
    hold_weights(model, dtype)

    def batches(chosen: np.ndarray) -> Iterator[tuple[Tensor, TeacherSignal]]:
        for start in range(0, len(chosen), batch_size):
            batch = cache.batch(chosen[start : start + batch_size]).to(device)
            yield batch.input_ids, batch.signal

    values = evaluate_batches(model, batches(sequence_ids), description="evaluate")
    is_seeds = cache.manifest.identity.content == "conditional"
    first = (cache.sequence_ids("all") if is_seeds else sequence_ids)[:KD_SEQUENCES]
    if num_sequences is not None:
        first = first[:num_sequences]
    if not np.array_equal(first, sequence_ids):
        measured = evaluate_batches(model, batches(first), description="kd loss")
        values["kd_loss"] = measured["kd_loss"]
    return values
