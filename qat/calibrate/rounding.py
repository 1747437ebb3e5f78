"""How far predicted costs of rounding are off, told by what rounding really does to the logits.

A cost with a diagonal of the Fisher information takes errors of different outputs, and of different
tokens, for independent. Those of queries and keys are not: they cost two to three times as much as
it says. So all linears of a kind are rounded to a coarse format, the errors scaled to a predicted
cost, and the KL that this gives, exact over the whole vocabulary, is what costs of the kind are
scaled by. It is quadratic in the errors down to half and up to twice the size taken here. White
noise, or rounding without a fitted scale, tells something else, as errors go with the weights.

Shape legend: N tokens, D hidden size.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.model.head import Tokens, hidden_states, logits_of
from qat.quant.quantized_tensor import QuantizedTensor
from qat.runtime.distributed import total_number, total_of

PROBE_KL = 0.05  # nats: well above what a thousand tokens do not tell, well below saturation
TOKENS_AT_ONCE = 256  # whose logits are held at a time


@dataclass(frozen=True, slots=True)
class Probe:
    """A linear's weight in a coarse format, on the CPU, and what such a format should cost."""

    quantized: QuantizedTensor
    cost: float
    """In nats per token."""


@torch.no_grad()
def measured_ratios(
    model: nn.Module, probes: Mapping[str, Probe], batch: Tokens
) -> dict[str, float]:
    """Return measured KL over predicted cost of coarse rounding, by the name of each linear.

    Linears whose names end alike are of a kind, and get the same.

    Args:
        model: Causal LM in eval mode, on its device; its weights are put back.
        probes: By the linear's name.
        batch: Text to measure on.
    """
    kinds: dict[str, list[str]] = {}
    for name in probes:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    clean = hidden_states(model, *batch).flatten(0, 1)  # (N, D)
    ratios = {}
    for names in kinds.values():
        expected = sum(probes[name].cost for name in names)
        ratio = 1.0
        if expected > 0:
            share = (PROBE_KL / expected) ** 0.5
            with rounded(model, {name: probes[name].quantized for name in names}, share):
                changed = hidden_states(model, *batch).flatten(0, 1)
            ratio = mean_kl(model, clean, changed) / PROBE_KL
        ratios |= dict.fromkeys(names, ratio)
    return ratios


@contextmanager
def rounded(
    model: nn.Module, quantized: Mapping[str, QuantizedTensor], share: float
) -> Iterator[None]:
    """Move weights by a share of the way to where a format has them; put them back at the end."""
    kept = {name: model.get_submodule(name).weight.data for name in quantized}
    for name, weight in kept.items():
        moved = weight.float().lerp(quantized[name].dequantize().to(weight.device), share)
        model.get_submodule(name).weight.data = moved.to(weight.dtype)
    try:
        yield
    finally:
        for name, weight in kept.items():
            model.get_submodule(name).weight.data = weight


def mean_kl(model: nn.Module, clean: Tensor, changed: Tensor) -> float:
    """Return the mean KL between the logits of hidden states, (N, D) each, in nats.

    Of several processes, over the states of all.
    """
    total = torch.zeros((), device=clean.device)
    for pair in zip(clean.split(TOKENS_AT_ONCE), changed.split(TOKENS_AT_ONCE), strict=True):
        target, found = (logits_of(model, rows).float().log_softmax(-1) for rows in pair)
        total += (target.exp() * (target - found)).sum()
    return float(total_of(total)) / total_number(len(clean))
