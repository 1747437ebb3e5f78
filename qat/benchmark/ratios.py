"""Timing of steps on batches whose content does not matter.

Shape legend: B batch, L tokens, T = L - 1 positions, K tokens the teacher is known on.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from qat.distill.teacher import TeacherSignal

TOP_K = 64


def random_batch(
    vocab_size: int, batch_size: int, seq_len: int, device: torch.device
) -> tuple[Tensor, TeacherSignal]:
    """Return random tokens and a top-k teacher for them."""
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(vocab_size, (batch_size, seq_len), generator=generator)
    shape = (batch_size, seq_len - 1)
    signal = TeacherSignal(
        kind="top-k",
        log_probs=torch.full((*shape, TOP_K), 0.9 / TOP_K).log(),
        mask=torch.ones(shape, dtype=torch.bool),
        token_ids=torch.randint(vocab_size, (*shape, TOP_K), generator=generator),
        log_tail=torch.full(shape, 0.1).log(),
    )
    return token_ids.to(device), signal.to(device)


def time_steps(step: Callable[[], object], num_steps: int, wait: Callable[[], None]) -> list[float]:
    """Return the seconds of each step; the first ones of a process warm up.

    Args:
        step: Takes one.
        num_steps: How many.
        wait: Returns when the device has done all its work.
    """
    seconds = []
    for _ in range(num_steps):
        wait()
        start = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - start)
    return seconds
