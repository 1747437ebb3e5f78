"""A student measured on a cache: the held-out split where there is one."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from qat.cache.read import CacheBatch, TeacherCache
from qat.distill.teacher import TeacherSignal
from qat.evaluate.kl import LazyTeacher, Numbers, evaluate_batches, live_teacher
from qat.model.surgery import hold_weights, quantized_layers
from qat.runtime.device import Device
from qat.runtime.distributed import share

HELD_SHARE = 0.3  # of a device's memory: what held weights may take
KD_SEQUENCES = 40  # the Speedrun Log's kd_loss is the mean over the first 40


def evaluate_on_cache(
    model: nn.Module,
    cache: TeacherCache,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_sequences: int | None = None,
    batch_size: int = 16,
    teacher: nn.Module | None = None,
    is_shared: bool = True,
) -> Numbers:
    """Return the numbers of `evaluate_batches`.

    The KL is exact (kl_nats) from a live teacher or a cache of hidden states, else kl_nats_lower.
    On a cache of the Speedrun Log's form, kd_loss is over its first sequences, whatever is held
    out.

    Args:
        model: On the device; quantized weights are formed once, and stay held, where the memory
            has room for them.
        cache: Teacher outputs; a cache without a held-out split is measured as a whole.
        device: Where the batches go.
        dtype: Compute dtype.
        num_sequences: At most so many; all when not given.
        batch_size: Sequences of a forward pass.
        teacher: The cache's teacher itself, on the device: compared with in place of what the
            cache keeps of it, except for kd_loss.
        is_shared: Whether processes that work together measure a part each; where they hold a
            part of the model each, all of them measure all.
    """
    split = "heldout" if cache.manifest.num_heldout else "all"
    sequence_ids = cache.sequence_ids(split)[:num_sequences]
    if has_room(model, device, dtype):
        hold_weights(model, dtype)

    def batches(chosen: np.ndarray, teacher: nn.Module | None) -> Iterator[tuple]:
        starts = range(0, len(chosen), batch_size)
        for start in share(starts) if is_shared else starts:
            batch = cache.batch(chosen[start : start + batch_size]).to(device)
            inputs = (batch.input_ids, batch.mask, batch.document_ids)
            known = teacher_of_batch(batch) if teacher is None else live_teacher(teacher, *inputs)
            yield batch.input_ids, known, batch.document_ids

    values = evaluate_batches(
        model,
        batches(sequence_ids, teacher),
        description="evaluate",
        kd_sequences=KD_SEQUENCES,
        is_shared=is_shared,
    )
    is_conditional = cache.manifest.identity.content == "conditional"
    first = (cache.sequence_ids("all") if is_conditional else sequence_ids)[:KD_SEQUENCES]
    if num_sequences is not None:
        first = first[:num_sequences]
    if teacher is not None or not np.array_equal(first, sequence_ids[: len(first)]):
        measured = evaluate_batches(
            model, batches(first, None), description="kd loss", is_shared=is_shared
        )
        values["kd_loss"] = measured["kd_loss"]
    return values


def has_room(model: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights formed once leave most of a device's memory free.

    Otherwise every forward forms them, one at a time: the same numbers, a little later.
    """
    total = Device.detect(str(device)).total_bytes()
    layers = quantized_layers(model).values()
    held = dtype.itemsize * sum(layer.out_features * layer.in_features for layer in layers)
    return total is None or held <= HELD_SHARE * total


def teacher_of_batch(batch: CacheBatch) -> TeacherSignal | LazyTeacher:
    """Return the teacher of a cached batch; from hidden states its logits are formed in chunks."""
    if "hidden" not in batch.fields:
        return batch.signal
    flat = {name: field.flatten(0, 1) for name, field in batch.fields.items()}  # (B * P, ...)

    def logits(rows: slice) -> torch.Tensor:
        return batch.to_logits({name: field[rows] for name, field in flat.items()})

    return LazyTeacher(batch.mask, logits)
