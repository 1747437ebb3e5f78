"""The linears of a decoder layer whose outputs are added to the residual stream.

Most models add what attention and MLP give to the hidden states as they were: s' = s + m y with a
number m, one unless the model says so. The linear that makes y can then make up for errors that s
has from earlier layers. Models that norm y first (Gemma 2 and 3, OLMo 2) have none. Nothing is
assumed of names: one forward pass shows which linears they are.

Shape legend: B batch, T tokens, D hidden size.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EXACT_SHARE = 1e-3  # of s' - s that it may differ from m y in float32; in 16 bits:
ROUNDED_SHARE = 0.05


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
        return lambda _module, args: points.append((name, args[0]))

    def note_output(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: outputs.update({name: output})

    with ExitStack() as hooks:
        for name, module in layer.named_modules():
            if getattr(module._parameters.get("weight"), "ndim", 0) == 1:  # a norm
                hooks.enter_context(module.register_forward_pre_hook(note_point(name)))
        for name in linears:
            module = layer.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(note_output(name)))
        points.append(("", run()))
    stream = [(name, value) for name, value in points if value.shape == points[-1][1].shape]
    found: dict[str, ResidualWrite] = {}
    for (at, before), (then, after) in zip(stream, stream[1:], strict=False):
        for linear, output in outputs.items():
            if (multiplier := share_added(before, after, output)) is not None:
                found[linear] = ResidualWrite(before=at, after=then, multiplier=multiplier)
    return found


def share_added(before: Tensor, after: Tensor, output: Tensor) -> float | None:
    """Return m of after = before + m output, None where there is no such number."""
    if output.shape != before.shape:
        return None
    change, added = (after - before).float(), output.float()
    multiplier = (change * added).sum() / added.square().sum().clamp_min(1e-30)
    tolerance = EXACT_SHARE if before.dtype == torch.float32 else ROUNDED_SHARE
    is_same = (
        change.norm() > 0 and (change - multiplier * added).norm() <= tolerance * change.norm()
    )
    return float(multiplier) if is_same else None
