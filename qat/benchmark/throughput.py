"""What one batch size costs: seconds, memory and the share of the chip's peak that is used.

Shape legend: O out, I in; B batch, L tokens, T = L - 1 positions, K tokens of a teacher.
"""

import math
import re
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from qat.distill.teacher import TeacherSignal
from qat.model.layers import FakeQuantLinear
from qat.model.surgery import quantized_layers

WARM_UP_STEPS = 2  # the first makes the optimizer's state, so the second is another graph
TOP_K = 64  # of a random teacher
# Dense products, in 10**12 a second, as makers state them; the first name found in a chip's counts.
PEAK_TFLOPS = {
    "B200": {"bf16": 2250, "fp32": 75},
    "H100 PCIe": {"bf16": 756, "fp32": 51},
    "H100|H200|GH200": {"bf16": 989, "fp32": 67},
    "A100": {"bf16": 312, "fp32": 19.5},
    "L4": {"bf16": 121, "fp32": 30.3},
    "T4": {"fp16": 65, "fp32": 8.1},
    "RTX 5090": {"bf16": 209.5, "fp32": 104.8},
    "RTX 4090": {"bf16": 165.2, "fp32": 82.6},
    "v6e": {"bf16": 918},
    "v5p": {"bf16": 459},
    "v5e|v5litepod": {"bf16": 197},
    "v4": {"bf16": 275},
}


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
    """Return the seconds of each step; `wait` returns when the device has done all its work."""
    seconds = []
    for _ in range(num_steps):
        wait()
        start = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure_steps(
    step: Callable[[], Tensor],
    num_steps: int,
    wait: Callable[[], None],
    peak_bytes: Callable[[], int],
    afterwards: Callable[[], object],
) -> dict[str, Any]:
    """Return the cost of steps that train, and of what a run does between them.

    Args:
        step: Takes one optimizer step, returns its loss on the device.
        num_steps: How many are timed after those that warm up.
        wait: Returns when the device has done all its work.
        peak_bytes: Most memory held so far.
        afterwards: Evaluates and saves; counts for memory, not for time.
    """
    losses: list[Tensor] = []
    seconds = time_steps(lambda: losses.append(step()), WARM_UP_STEPS + num_steps, wait)
    step_bytes = peak_bytes()
    afterwards()
    wait()
    steady = seconds[WARM_UP_STEPS:]
    loss = float(losses[-1])
    return {
        "warm_up_seconds": sum(seconds[:WARM_UP_STEPS]),
        "seconds": steady,
        "step_seconds": median(steady),
        "step_bytes": step_bytes,
        "peak_bytes": peak_bytes(),
        "loss": loss if math.isfinite(loss) else None,
    }


def flops_per_token(model: nn.Module, trained: list[FakeQuantLinear]) -> int:
    """Return what a training step must multiply for a token: forward, and backward where needed.

    Gradients of activations are needed all the way, those of weights (O, I) where they train.
    Attention's own products and recomputed activations are left out.
    """
    layers = list(quantized_layers(model).values())
    layers += [module for module in model.modules() if isinstance(module, nn.Linear)]
    forward, backward = (sum(x.in_features * x.out_features for x in y) for y in (layers, trained))
    return 4 * forward + 2 * backward


def peak_flops(chip: str | None, dtype: str) -> float | None:
    """Return a chip's peak in products and sums a second, None where it is not known."""
    for names, tflops in PEAK_TFLOPS.items():
        if chip and re.search(rf"\b({names})\b", chip):
            return tflops[dtype] * 1e12 if dtype in tflops else None
    return None


def rates(row: dict[str, Any], *, seq_len: int, peak: float | None) -> dict[str, Any]:
    """Return steady tokens a second, its spread and the share of the peak, from a measured row."""
    tokens = row["batch"] * seq_len
    rate = tokens / row["step_seconds"]
    return {
        "tokens_per_second": rate,
        "tokens_per_second_spread": [
            tokens / s for s in (max(row["seconds"]), min(row["seconds"]))
        ],
        "mfu": None if peak is None else rate * row["flops_per_token"] / peak,
    }
