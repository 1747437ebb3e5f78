"""A student measured on any text: full-vocabulary KL from a live teacher, perplexity."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qat.evaluate.kl import LazyTeacher, Numbers, evaluate_batches, live_teacher
from qat.model.surgery import hold_weights
from qat.runtime.distributed import share


def evaluate_on_text(
    model: nn.Module,
    teacher: nn.Module | None,
    blocks: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int = 8,
    num_context: int = 0,
) -> Numbers:
    """Return the numbers of `evaluate_batches`; the KL is exact.

    Every position after the context is compared, the last one of a block too; perplexity is of
    the tokens that the block itself holds after them. Processes that work together measure a part
    each.

    Args:
        model: The student, on the device; quantized weights are formed once.
        teacher: Of the same vocabulary, on the device; None leaves the distances null.
        blocks: Token ids, (N, L).
        device: Where the batches go.
        dtype: Compute dtype.
        batch_size: Blocks of a forward pass.
        num_context: Positions at the start of a block that do not count: 1 where it is BOS.

    Raises:
        ValueError: If there is no block, or the two have different vocabularies.
    """
    if not len(blocks):
        raise ValueError("--text is shorter than one block; give more text or a smaller --seq-len")
    widths = [one.config.get_text_config().vocab_size for one in (model, teacher or model)]
    require_equal_widths(*widths)
    hold_weights(model, dtype)

    def batches() -> Iterator[tuple[Tensor, LazyTeacher]]:
        for start in share(range(0, len(blocks), batch_size)):
            part = blocks[start : start + batch_size].to(device)
            mask = torch.ones_like(part, dtype=torch.bool)
            mask[:, :num_context] = False
            yield part, LazyTeacher(mask) if teacher is None else live_teacher(teacher, part, mask)

    return evaluate_batches(model, batches(), description="evaluate", is_shared=True)


def require_equal_widths(student: int, teacher: int) -> None:
    """Refuse two vocabularies of different sizes."""
    if student != teacher:
        raise ValueError(
            f"--teacher has a vocabulary of {teacher}, the student of {student}; "
            "give the model that the student was made from"
        )
