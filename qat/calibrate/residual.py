"""The linears of a decoder layer whose outputs are added to the residual stream.

Most models add what attention and MLP give to the hidden states as they were: s' = s + m y with a
number m, one unless the model says so. The linear that makes y can then make up for errors that s
has from earlier layers. Models that norm y first (Gemma 2 and 3, OLMo 2) have none. Nothing is
assumed of names: one forward pass in float32 shows which linears they are.

Shape legend: B batch, T tokens, D hidden size.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 8 * torch.finfo(torch.float32).eps  # of |s| + |s'| + |m y|, number by number


@dataclass(frozen=True, kw_only=True, slots=True)
class ResidualWrite:
    """What a linear's output is added to."""

    before: str
    """Module of the decoder layer whose input s is."""
    after: str
    """Module whose input s' is; empty where it is the layer's output."""
    multiplier: float
    """m."""


@torch.no_grad()
def residual_writes(
    layer: nn.Module, linears: Sequence[str], run: Callable[[], Tensor]
) -> dict[str, ResidualWrite]:
    """Return the linears that write into the residual stream, by name.

    Args:
        layer: A decoder layer.
        linears: Their names in it.
        run: Calls the layer on hidden states (B, T, D) and returns those after it.
    """
    points: list[tuple[str, Tensor]] = []  # of the stream, and other tensors of its shape
    outputs: dict[str, Tensor] = {}

    def note_point(name: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: points.append((name, first_input(args, kwargs)))

    def note_output(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: outputs.update({name: output})

    with ExitStack() as hooks:
        for name, module in layer.named_modules():
            if getattr(module._parameters.get("weight"), "ndim", 0) == 1:  # a norm
                hook = module.register_forward_pre_hook(note_point(name), with_kwargs=True)
                hooks.enter_context(hook)
        for name in linears:
            module = layer.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(note_output(name)))
        points.append(("", run()))
    stream = [(name, value) for name, value in points if value.shape == points[-1][1].shape]
    found: dict[str, ResidualWrite] = {}
    for (at, before), (then, after) in combinations(stream, 2):
        for linear, output in outputs.items():
            if linear not in found and (m := multiplier_of_sum(before, after, output)) is not None:
                found[linear] = ResidualWrite(before=at, after=then, multiplier=m)
    return found


def multiplier_of_sum(before: Tensor, after: Tensor, output: Tensor) -> float | None:
    """Return m of after = before + m output, None where there is no such number; float32."""
    if output.shape != before.shape or not (change := after - before).any():
        return None
    multiplier = (change * output).sum() / output.square().sum().clamp_min(1e-30)
    added = multiplier * output
    bound = TOLERANCE * (before.abs() + after.abs() + added.abs())
    return float(multiplier) if ((change - added).abs() <= bound).all() else None


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the first input of a module's call, given by place or by name."""
    return args[0] if args else next(iter(kwargs.values()))
