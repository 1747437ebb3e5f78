"""AdamW whose two averages have 8 bits a number, by torchao: 2 bytes a weight in the place of 8.

Each 256 numbers of an average, rows one after another, have a float32 scale and a code in a table
that is finer near zero. Parameters of fewer than 4096 numbers, or of no multiple of 256, keep
float32. torchao compiles its step, which the first step takes a while for; on a CPU, where that
takes a compiler, the same step goes over some rows at a time.

Source: Dettmers et al. 2022, arXiv:2110.02861; torchao.optim.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torchao.optim import AdamW8bit
from torchao.optim.adam import single_param_adam
from torchao.optim.subclass_8bit import OptimState8bit

NUMBERS_AT_ONCE = 2**17  # whose temporaries, some 60 bytes each, are there together
IS_SIGNED = {"exp_avg": True, "exp_avg_sq": False}
CODES, SCALE = "_codes", "_scale"  # what an average is stored as, after its name


class AdamW8bitInRows(AdamW8bit):
    """torchao's AdamW, which on a CPU forms no temporaries of whole parameters."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step as torchao does."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        if any(parameter.device.type != "cpu" for parameter in parameters):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.step_in_rows(parameter, group)
        return loss

    def step_in_rows(self, parameter: Tensor, group: Mapping[str, float | Tensor]) -> None:
        """Update a parameter and its averages."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name, is_signed in IS_SIGNED.items():
                state[name] = self._new_buffer(parameter, is_signed)
        state["step"] += 1
        for rows in self.row_chunks(parameter):
            single_param_adam(
                parameter.detach()[rows],
                parameter.grad[rows],
                state["step"],
                *(state[name][rows] for name in IS_SIGNED),
                None,
                group["lr"],
                *group["betas"],
                group["weight_decay"],
                group["eps"],
                self.is_adamw,
                False,
            )

    def row_chunks(self, parameter: Tensor) -> list[slice]:
        """Return rows that are whole blocks together, all of a parameter."""
        num_inputs = max(1, parameter[:1].numel())
        unit = self.block_size // math.gcd(self.block_size, num_inputs)
        step = max(unit, NUMBERS_AT_ONCE // num_inputs // unit * unit)
        starts = range(0, len(parameter), step)
        return [slice(start, min(start + step, len(parameter))) for start in starts]


def joined_average(name: str, codes: Tensor, scale: Tensor) -> OptimState8bit:
    """Return an average of what `stored_averages` made of it.

    Args:
        name: exp_avg or exp_avg_sq.
        codes: uint8, of the parameter's shape.
        scale: float32, of each block.

    Raises:
        ValueError: If they do not belong together.
    """
    block_size = codes.numel() // max(1, scale.numel())
    if codes.dtype != torch.uint8 or scale.dtype != torch.float32 or scale.dim() != 1:
        raise ValueError(f"{name} is {codes.dtype} with scales in {scale.dtype}, not 8 bits")
    if block_size * scale.numel() != codes.numel():
        raise ValueError(f"{name} has {scale.numel()} scales for {codes.numel()} numbers")
    average = OptimState8bit.zeros(
        codes.shape, IS_SIGNED[name], block_size, codes.device, dtype=torch.float32
    )
    average.codes.copy_(codes)
    average.scale.copy_(scale)
    return average


def stored_averages(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a parameter's state as plain tensors: codes and scales in the place of averages."""
    stored: dict[str, Tensor] = {}
    for name, values in state.items():
        if isinstance(values, OptimState8bit):
            stored |= {f"{name}{CODES}": values.codes, f"{name}{SCALE}": values.scale}
        else:
            stored[name] = values
    return stored


def read_averages(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a parameter's state of what `stored_averages` gave."""
    quantized = [name for name in IS_SIGNED if f"{name}{CODES}" in stored]
    taken = {f"{name}{end}" for name in quantized for end in (CODES, SCALE)}
    state = {name: values for name, values in stored.items() if name not in taken}
    for name in quantized:
        state[name] = joined_average(name, stored[f"{name}{CODES}"], stored[f"{name}{SCALE}"])
    return state
