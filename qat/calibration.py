"""Activation statistics of each quantizable linear, from a few forward passes.

Shape legend: B batch, T tokens, I in.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm


@torch.no_grad()
def collect_second_moments(
    model: nn.Module, linears: dict[str, nn.Module], batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Return the mean square of every input channel of each linear, (I,) float32.

    Args:
        model: Causal LM in eval mode.
        linears: Modules to watch, by name.
        batches: Token ids, (B, T) each, on the model's device.

    Raises:
        ValueError: If there is no batch, or a statistic is not finite.
    """
    sums: dict[str, Tensor] = {}
    last: list[Tensor] = []  # an input and its sum: q, k and v read one input, summed once
    num_tokens = 0

    def watch(name: str):
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if not last or last[0] is not x:
                last[:] = [x, x.flatten(0, -2).float().square().sum(0)]
            total = last[1]
            sums[name] = sums[name] + total if name in sums else total

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
    try:
        for token_ids in tqdm(batches, desc="calibrate", unit="batch", leave=False):
            last.clear()
            model(input_ids=token_ids, use_cache=False, logits_to_keep=1)
            num_tokens += token_ids.numel()
    finally:
        for handle in handles:
            handle.remove()
    if not num_tokens:
        raise ValueError("calibration has no tokens; give a cache with at least one sequence")
    moments = {name: total / num_tokens for name, total in sums.items()}
    for name, moment in moments.items():
        if not torch.isfinite(moment).all():
            raise ValueError(
                f"{name}: inputs hold NaN or infinity during calibration; try --dtype fp32"
            )
    return moments
