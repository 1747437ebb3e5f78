"""The student in PyTorch against its exported file in a runtime, on fixed prompts.

The student answers greedily; the runtime reads the same tokens in one pass. Where its best token
first differs from the answer's is where its own greedy answer would have left the student's.

Shape legend: T tokens, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

Runtime = Callable[[list[int]], np.ndarray]  # from T token ids to logits, (T, V) float32


def compare_with_runtime(
    student: nn.Module, runtime: Runtime, prompts: Sequence[list[int]], *, num_new_tokens: int
) -> dict[str, Any]:
    """Return how far a runtime's logits are from the student's, on the CPU.

    Returns:
        max_logit_difference, kl_nats (mean over positions), kl_nats_worst, top1_agreement,
        same_answers (share of prompts), positions, and rows, one a prompt.
    """
    rows = []
    for token_ids in tqdm(prompts, desc="parity", unit="prompt", leave=False):
        answer, expected = answer_greedily(student, token_ids, num_new_tokens)
        found = torch.from_numpy(np.ascontiguousarray(runtime(token_ids + answer[:-1]))).float()
        rows.append(compare_logits(expected, found[:, : expected.shape[1]], len(token_ids), answer))
    positions = sum(row["positions"] for row in rows)
    return {
        "max_logit_difference": max(row["max_logit_difference"] for row in rows),
        "kl_nats": sum(row["kl_nats"] * row["positions"] for row in rows) / positions,
        "kl_nats_worst": max(row["kl_nats_worst"] for row in rows),
        "top1_agreement": sum(r["top1_agreement"] * r["positions"] for r in rows) / positions,
        "same_answers": sum(row["first_differing_token"] is None for row in rows) / len(rows),
        "positions": positions,
        "rows": rows,
    }


@torch.inference_mode()
def answer_greedily(
    student: nn.Module, token_ids: list[int], num_new_tokens: int
) -> tuple[list[int], Tensor]:
    """Return a greedy answer's tokens and the logits, (T, V), of every position that was read."""
    read = list(token_ids)
    for _ in range(num_new_tokens):
        logits = student(torch.tensor([read]), use_cache=False).logits[0].float()  # (T, V)
        read.append(int(logits[-1].argmax()))
    return read[len(token_ids) :], logits


def answer_with_runtime(
    runtime: Runtime, token_ids: list[int], num_new_tokens: int, ends: Collection[int]
) -> list[int]:
    """Return a runtime's greedy answer, without the token that ends it.

    It reads everything again for each token: right for short answers.
    """
    read = list(token_ids)
    for _ in range(num_new_tokens):
        token = int(runtime(read)[-1].argmax())
        if token in ends:
            break
        read.append(token)
    return read[len(token_ids) :]


def compare_logits(
    expected: Tensor, found: Tensor, num_prompt_tokens: int, answer: list[int]
) -> dict[str, Any]:
    """Return one prompt's row, of the logits (T, V) of student and runtime."""
    target, actual = expected.log_softmax(-1), found.log_softmax(-1)
    kl = (target.exp() * (target - actual)).sum(-1)  # (T,)
    best = found[num_prompt_tokens - 1 :].argmax(-1).tolist()
    differing = [place for place, token in enumerate(answer) if token != best[place]]
    return {
        "positions": len(kl),
        "max_logit_difference": float((expected - found).abs().max()),
        "kl_nats": float(kl.mean()),
        "kl_nats_worst": float(kl.max()),
        "top1_agreement": float((expected.argmax(-1) == found.argmax(-1)).float().mean()),
        "first_differing_token": differing[0] if differing else None,
    }
