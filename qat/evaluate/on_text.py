"""A student measured on any text: full-vocabulary KL from a live teacher, perplexity."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qat.distill.teacher import TeacherSignal, dense_signal
from qat.evaluate.kl import evaluate_batches
from qat.model.surgery import hold_weights


def evaluate_on_text(
    model: nn.Module,
    teacher: nn.Module | None,
    blocks: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int = 8,
) -> dict[str, float | int | None]:
    """Return kl_nats, kd_loss, perplexity, its error, top1_agreement and tokens.

    Args:
        model: The student, on the device; quantized weights are formed once.
        teacher: Of the same vocabulary, on the device; None leaves the distances null.
        blocks: Token ids, (N, L).
        device: Where the batches go.
        dtype: Compute dtype.
        batch_size: Blocks of a forward pass.

    Raises:
        ValueError: If there is no block, or the two have different vocabularies.
    """
    if not len(blocks):
        raise ValueError("--text is shorter than one block; give more text or a smaller --seq-len")
    sizes = model.config.vocab_size, (teacher or model).config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"--teacher has a vocabulary of {sizes[1]}, the student of {sizes[0]}; "
            "give the model that the student was made from"
        )
    hold_weights(model, dtype)

    def batches() -> Iterator[tuple[Tensor, TeacherSignal]]:
        for part in blocks.to(device).split(batch_size):
            mask = torch.ones(part.shape[0], part.shape[1] - 1, dtype=torch.bool, device=device)
            logits = (teacher or model)(input_ids=part, use_cache=False).logits[:, :-1]
            yield part, dense_signal(logits, mask)

    values = evaluate_batches(model, batches(), description="evaluate")
    if teacher is None:
        values |= dict.fromkeys(("kl_nats", "kd_loss", "top1_agreement"))
    return values
