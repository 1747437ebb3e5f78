"""Activation statistics of each quantizable linear, from a few forward passes.

Processes that work together read a part of the text each; what they get is of all of it.

Shape legend: B batch, T tokens, I in.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qat.model.head import Tokens, hidden_states
from qat.quant.drift import Moments
from qat.runtime.device import run_recorded
from qat.runtime.distributed import total_number, total_of

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
    sums = SquareSums()
    num_tokens = 0
    with ExitStack() as hooks:
        for name, module in linears.items():
            hooks.enter_context(module.register_forward_pre_hook(sums.watch(name)))
        if head is not None:
            norm = model.get_decoder().norm
            hook = norm.register_forward_hook(lambda _norm, _inputs, out: sums.add(head, out))
            hooks.enter_context(hook)
        for batch in map(Tokens.of, tqdm(batches, desc="calibrate", unit="batch", leave=False)):
            sums.forget()
            # Not the head: a few rows of it take 5 GB of scratch memory at 150,000 tokens (oneDNN).
            hidden_states(model, *batch)
            num_tokens += batch.token_ids.numel()
            run_recorded(batch.token_ids.device)
    if not num_tokens:
        raise ValueError("calibration has no tokens; give a cache with at least one sequence")
    return sums.means(num_tokens)


class SquareSums:
    """Sums of the squares of modules' inputs, (I,) float32 by name, over all tokens."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.last: list[Tensor] = []  # an input and its sum: q, k and v read one input, summed once

    def watch(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Return the hook that adds a module's inputs before its forward."""
        return lambda _module, inputs: self.add(name, inputs[0])

    def add(self, name: str, x: Tensor) -> None:
        """Add inputs, (..., I)."""
        if not self.last or self.last[0] is not x:
            self.last[:] = [x, x.flatten(0, -2).float().square().sum(0)]
        self.sums[name] = self.sums[name] + self.last[1] if name in self.sums else self.last[1]

    def forget(self) -> None:
        """Let go of the last input."""
        self.last.clear()

    def means(self, num_tokens: int) -> dict[str, Tensor]:
        """Return the mean squares over the tokens of all processes, refused where not finite."""
        count = total_number(num_tokens)
        return {name: finite_mean(name, total_of(own), count) for name, own in self.sums.items()}


def finite_mean(name: str, total: Tensor, count: int | Tensor) -> Tensor:
    """Return total / count, refused if it is not finite."""
    if not torch.isfinite(total).all():
        raise ValueError(
            f"{name}: inputs hold NaN or infinity during calibration; try --dtype fp32"
        )
    return total / count


class Fed(NamedTuple):
    """A batch of a linear's inputs, and what shows what its output should be."""

    quantized: Tensor
    """x_q, (B, T, I)."""
    dense: Tensor | None = None
    """x, (B, T, I)."""
    wanted: Tensor | None = None
    """y, (B, T, O), in the place of W x."""
    weights: Tensor | None = None
    """How much each token counts, (B, T, 1); all alike when not given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputStatistics:
    """What a linear's inputs are like: on all tokens, and on each half of them."""

    all: Moments
    halves: tuple[Moments, ...]
    """Two; one if there is a single token."""
    sample: Fed | None = None
    """Some of the inputs themselves, (N, I), of a head."""


def input_statistics(name: str, batches: Iterable[Fed]) -> InputStatistics:
    """Return the finite statistics of a module's inputs, in all processes.

    The first half of each batch's tokens is one half of them: of its sequences, or of a lone one.
    """
    sums: list[Moments] = []
    masses: list[Tensor] = []
    for batch in batches:
        parts = [None if part is None else part.flatten(0, -2).chunk(2) for part in batch]
        for half in range(len(parts[0])):
            tokens = Fed(*(None if part is None else part[half] for part in parts))
            if half == len(sums):
                sums.append(zero_moments(tokens))
                masses.append(torch.zeros((), device=tokens.quantized.device))
            weights = tokens.weights
            masses[half] += len(tokens.quantized) if weights is None else weights.sum()
            add_moments(sums[half], tokens)
    sums = [all_moments(half) for half in sums]
    masses = [total_of(one) for one in masses]
    mass = torch.stack(masses).sum()
    whole = mean_moments(name, sums, mass)
    halves = tuple(mean_moments(name, [half], one) for half, one in zip(sums, masses, strict=True))
    return InputStatistics(all=whole, halves=halves)


def all_moments(own: Moments) -> Moments:
    """Return the sums over the tokens of all processes."""
    fields = (own.hessian, own.drift, own.wanted)
    hessian, drift, wanted = (None if one is None else total_of(one) for one in fields)
    return Moments(hessian=hessian, drift=drift, wanted=wanted)


def mean_moments(name: str, sums: Sequence[Moments], mass: Tensor) -> Moments:
    """Return the mean over tokens of one or more sums, refused where not finite."""

    def mean(field: str) -> Tensor | None:
        values = [getattr(part, field) for part in sums]
        return None if values[0] is None else finite_mean(name, reduce(torch.add, values), mass)

    hessian = mean("hessian")
    lower = torch.ones_like(hessian, dtype=torch.bool).tril(-1)
    hessian = torch.where(lower, hessian.T, hessian)
    return Moments(hessian=hessian, drift=mean("drift"), wanted=mean("wanted"))


def zero_moments(tokens: Fed) -> Moments:
    """Return sums over no token yet, for tokens (N, I) such as these."""
    x, wanted = tokens.quantized, tokens.wanted

    def zeros(num_rows: int) -> Tensor:
        return torch.zeros(num_rows, x.shape[1], device=x.device)

    return Moments(
        hessian=zeros(x.shape[1]),
        drift=None if tokens.dense is None else zeros(x.shape[1]),
        wanted=None if wanted is None else zeros(wanted.shape[1]),
    )


def add_moments(sums: Moments, tokens: Fed) -> None:
    """Add tokens, (N, I) and (N, O), to sums, of whose H the upper triangle is kept up to date."""
    x, expected, wanted, weights = tokens
    weighted = x.float() if weights is None else x.float() * weights.float()
    add_gram(sums.hessian, x.float(), weighted)
    if expected is not None:
        # A difference bears the compute dtype: what its product rounds away is small against H.
        sums.drift.add_((expected - x).T @ (x if weights is None else weighted.to(x.dtype)))
    if wanted is not None:
        sums.wanted.add_(wanted.float().T @ weighted)


def second_moment(name: str, inputs: Iterable[Tensor], weights: Tensor | None = None) -> Tensor:
    """Return mean x x^T, (I, I) float32, of a module's inputs, (B, T, I) each, in all processes.

    Weights (N,) say how much each token counts, all batches together.
    """
    total, num_tokens = None, 0
    if weights is not None:
        mean = total_of(weights.sum()) / total_number(len(weights))
        weights = weights / mean.clamp_min(1e-30)
    for batch in inputs:
        x = batch.flatten(0, -2).float()
        total = torch.zeros(x.shape[1], x.shape[1], device=x.device) if total is None else total
        if weights is not None:
            x = x * weights[num_tokens : num_tokens + len(x)].sqrt().unsqueeze(1)
        add_gram(total, x, x)
        num_tokens += len(x)
    total = total_of(total)
    return finite_mean(name, total.triu() + total.triu(1).T, total_number(num_tokens))


def add_gram(total: Tensor, x: Tensor, weighted: Tensor) -> None:
    """Add x^T (weighted x), (I, I), to a total, of which the upper triangle is kept up to date."""
    for first in range(0, x.shape[1], GRAM_PANEL):
        panel = slice(first, first + GRAM_PANEL)
        total[panel, first:].addmm_(x[:, panel].T, weighted[:, first:])
