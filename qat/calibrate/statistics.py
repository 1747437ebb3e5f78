"""Activation statistics of each quantizable linear, from a few forward passes.

Shape legend: B batch, T tokens, I in.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qat.model.head import Tokens, hidden_states
from qat.runtime.device import run_recorded

GRAM_PANEL = 384  # columns of a product: spares most of the lower triangle, still wide
Batch = Tensor | Tokens


@torch.no_grad()
def collect_second_moments(
    model: nn.Module,
    linears: dict[str, nn.Module],
    batches: Iterable[Batch],
    *,
    head: str | None = None,
) -> dict[str, Tensor]:
    """Return the mean square of every input channel of each linear, (I,) float32.

    Args:
        model: Causal LM in eval mode.
        linears: Modules to watch, by name.
        batches: Token ids, (B, T) each, on the model's device; `Tokens` where documents are packed.
        head: Name under which the head's inputs are returned; None = not at all.

    Raises:
        ValueError: If there is no batch, or a statistic is not finite.
    """
    sums: dict[str, Tensor] = {}
    last: list[Tensor] = []  # an input and its sum: q, k and v read one input, summed once
    num_tokens = 0

    def watch(name: str):
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            add(name, inputs[0])

        return hook

    def add(name: str, x: Tensor) -> None:
        if not last or last[0] is not x:
            last[:] = [x, x.flatten(0, -2).float().square().sum(0)]
        sums[name] = sums[name] + last[1] if name in sums else last[1]

    with ExitStack() as hooks:
        for name, module in linears.items():
            hooks.enter_context(module.register_forward_pre_hook(watch(name)))
        if head is not None:
            norm = model.get_decoder().norm
            hook = norm.register_forward_hook(lambda _norm, _inputs, out: add(head, out))
            hooks.enter_context(hook)
        for batch in map(Tokens.of, tqdm(batches, desc="calibrate", unit="batch", leave=False)):
            last.clear()
            # Not the head: a few rows of it take 5 GB of scratch memory at 150,000 tokens (oneDNN).
            hidden_states(model, *batch)
            num_tokens += batch.token_ids.numel()
            run_recorded(batch.token_ids.device)
    if not num_tokens:
        raise ValueError("calibration has no tokens; give a cache with at least one sequence")
    return {name: finite_mean(name, total, num_tokens) for name, total in sums.items()}


def finite_mean(name: str, total: Tensor, count: int) -> Tensor:
    """Return total / count, refused if it is not finite."""
    if not torch.isfinite(total).all():
        raise ValueError(
            f"{name}: inputs hold NaN or infinity during calibration; try --dtype fp32"
        )
    return total / count


@dataclass(frozen=True, kw_only=True, slots=True)
class InputStatistics:
    """What a linear's inputs are like: x_q those of the quantized model, x of the dense one."""

    hessian: Tensor
    """mean x_q x_q^T, (I, I) float32."""
    drift: Tensor
    """mean (x - x_q) x_q^T, (I, I) float32: what the layers before this one did to its inputs."""


def input_statistics(name: str, inputs: Iterable[tuple[Tensor, Tensor]]) -> InputStatistics:
    """Return the finite statistics of a module's inputs: of each batch x_q and x, (B, T, I)."""
    hessian = drift = None
    num_tokens = 0
    for quantized, dense in inputs:
        x = quantized.flatten(0, -2)
        if hessian is None:
            hessian = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            drift = torch.zeros_like(hessian)
        change = dense.flatten(0, -2) - x
        add_gram(hessian, x.float())
        # A difference bears the compute dtype: what its product rounds away is small against H.
        drift += change.to(dense.dtype).T @ x.to(dense.dtype)
        num_tokens += len(x)
    return InputStatistics(
        hessian=finite_mean(name, hessian.triu() + hessian.triu(1).T, num_tokens),
        drift=finite_mean(name, drift, num_tokens),
    )


def second_moment(name: str, inputs: Iterable[Tensor], weights: Tensor | None = None) -> Tensor:
    """Return mean x x^T, (I, I) float32, of a module's inputs, (B, T, I) each.

    Weights (N,) say how much each token counts, all batches together.
    """
    total, num_tokens = None, 0
    weights = None if weights is None else weights / weights.mean().clamp_min(1e-30)
    for batch in inputs:
        x = batch.flatten(0, -2).float()
        total = torch.zeros(x.shape[1], x.shape[1], device=x.device) if total is None else total
        if weights is not None:
            x = x * weights[num_tokens : num_tokens + len(x)].sqrt().unsqueeze(1)
        add_gram(total, x)
        num_tokens += len(x)
    return finite_mean(name, total.triu() + total.triu(1).T, num_tokens)


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add x^T x, (I, I), to a total, of which only the upper triangle is kept up to date."""
    for first in range(0, x.shape[1], GRAM_PANEL):
        panel = slice(first, first + GRAM_PANEL)
        total[panel, first:].addmm_(x[:, panel].T, x[:, first:])
