"""The student in PyTorch against its exported file in a runtime, on fixed prompts.

The student answers greedily; the runtime reads the same tokens in one pass. Where its best token
first differs from the answer's is where its own greedy answer would have left the student's.

Shape legend: T tokens, V vocabulary.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

Runtime = Callable[[list[int]], np.ndarray]  # from T token ids to logits, (T, V) float32


def compare_with_runtime(
    student: nn.Module,
    runtime: Runtime,
    prompts: Sequence[list[int]],
    *,
    num_new_tokens: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Return how far a runtime's logits are from the student's, on the CPU.

    Logits are compared on greedy answers; sampled ones, at temperature one, draw by the same noise
    in both.

    Returns:
        max_logit_difference, kl_nats (mean over positions), kl_nats_worst, top1_agreement,
        same_answers and same_samples (shares of prompts), equal_tokens (mean number of an answer's
        tokens before the first that differs), positions, and rows, one a prompt.
    """
    rows = []
    for number, token_ids in enumerate(tqdm(prompts, desc="parity", unit="prompt", leave=False)):
        answer, expected = answer_of(student, token_ids, num_new_tokens)
        found = logits_of_runtime(runtime, token_ids + answer[:-1], expected.shape[1])
        row = compare_logits(expected, found)
        row["first_differing_token"] = first_difference(found, len(token_ids), answer)
        noise = gumbel_noise((num_new_tokens, expected.shape[1]), seed + number)
        answer, _ = answer_of(student, token_ids, num_new_tokens, noise)
        found = logits_of_runtime(runtime, token_ids + answer[:-1], expected.shape[1])
        row["first_differing_sample"] = first_difference(found, len(token_ids), answer, noise)
        rows.append(row)
    positions = sum(row["positions"] for row in rows)
    return {
        "max_logit_difference": max(row["max_logit_difference"] for row in rows),
        "kl_nats": sum(row["kl_nats"] * row["positions"] for row in rows) / positions,
        "kl_nats_worst": max(row["kl_nats_worst"] for row in rows),
        "top1_agreement": sum(r["top1_agreement"] * r["positions"] for r in rows) / positions,
        "same_answers": sum(row["first_differing_token"] is None for row in rows) / len(rows),
        "same_samples": sum(row["first_differing_sample"] is None for row in rows) / len(rows),
        "equal_tokens": sum(num_equal(row, num_new_tokens) for row in rows) / len(rows),
        "positions": positions,
        "rows": rows,
    }


def num_equal(row: Mapping[str, Any], num_new_tokens: int) -> int:
    """Return how many tokens of a greedy answer are equal before one differs."""
    differing = row["first_differing_token"]
    return num_new_tokens if differing is None else differing


def gumbel_noise(shape: tuple[int, int], seed: int) -> Tensor:
    """Return noise by which the largest of noisy logits is a sample of their softmax."""
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return -(-uniform.clamp_min(1e-20).log()).log()


@torch.inference_mode()
def answer_of(
    student: nn.Module, token_ids: list[int], num_new_tokens: int, noise: Tensor | None = None
) -> tuple[list[int], Tensor]:
    """Return an answer's tokens and the logits, (T, V), of every position that was read.

    Each token is that of the largest logit, with noise (N, V) that of the largest noisy one.
    """
    read = list(token_ids)
    for place in range(num_new_tokens):
        logits = student(torch.tensor([read]), use_cache=False).logits[0].float()  # (T, V)
        last = logits[-1] if noise is None else logits[-1] + noise[place]
        read.append(int(last.argmax()))
    return read[len(token_ids) :], logits


def logits_of_runtime(runtime: Runtime, token_ids: list[int], vocab_size: int) -> Tensor:
    """Return a runtime's logits of tokens, (T, V), without those that pad its vocabulary."""
    return torch.from_numpy(np.ascontiguousarray(runtime(token_ids))).float()[:, :vocab_size]


def first_difference(
    found: Tensor, num_prompt_tokens: int, answer: list[int], noise: Tensor | None = None
) -> int | None:
    """Return the place of an answer's first token that a runtime's logits (T, V) do not choose."""
    last = found[num_prompt_tokens - 1 :]
    best = (last if noise is None else last + noise).argmax(-1).tolist()
    pairs = enumerate(zip(answer, best, strict=True))
    return next((place for place, (token, own) in pairs if token != own), None)


def answer_with_runtime(
    runtime: Runtime, token_ids: list[int], num_new_tokens: int, ends: Collection[int]
) -> list[int]:
    """Return a runtime's greedy answer, without the token that ends it.

    A runtime that can read on reads each token once; others read everything again for each token:
    right for short answers.
    """
    reads_on = hasattr(runtime, "read_on")
    if reads_on:
        runtime.forget()
    read, unread = list(token_ids), list(token_ids)
    for _ in range(num_new_tokens):
        logits = runtime.read_on(unread) if reads_on else runtime(read)[-1]
        token = int(logits.argmax())
        if token in ends:
            break
        read.append(token)
        unread = [token]
    return read[len(token_ids) :]


def compare_logits(expected: Tensor, found: Tensor) -> dict[str, Any]:
    """Return one prompt's row, of the logits (T, V) of student and runtime."""
    target, actual = expected.log_softmax(-1), found.log_softmax(-1)
    kl = (target.exp() * (target - actual)).sum(-1)  # (T,)
    return {
        "positions": len(kl),
        "max_logit_difference": float((expected - found).abs().max()),
        "kl_nats": float(kl.mean()),
        "kl_nats_worst": float(kl.max()),
        "top1_agreement": float((expected.argmax(-1) == found.argmax(-1)).float().mean()),
    }
