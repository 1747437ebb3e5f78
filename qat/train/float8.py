"""Products of decoder layers' linears in float8, by torchao, where a device has them.

Weights stay float32: torchao scales each operand of a product by its largest entry, rounds it to
float8 (e4m3; e5m2 for gradients of outputs) and multiplies, forward and back. A model keeps the
names of its weights.

Source: torchao's float8 training; Micikevicius et al. 2022, arXiv:2209.05433, for the two formats.
"""

from importlib.util import find_spec

import torch
from torch import nn

from qat.runtime.device import has_float8

MULTIPLE = 16  # of both sides of a weight, which float8 products take


def why_no_float8(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why products stay in the compute dtype; None where float8 may take their place."""
    if not has_float8(device):
        return f"{device} does not multiply in float8"
    if dtype != torch.bfloat16:
        return "what is not in float8 must be bf16; give --dtype bf16"
    if find_spec("torchao") is None:
        return "torchao is not installed; pip install '.[torchao]'"
    return None


def multiply_in_float8(model: nn.Module, *, emulate: bool = False) -> int:
    """Let linears of numbered layers multiply in float8; return how many do.

    The head, and linears of sides that are no multiple of 16, stay as they are.

    Args:
        model: Causal LM.
        emulate: Round to float8 and multiply in the compute dtype, on any device.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    chosen: list[str] = []

    def choose(linear: nn.Module, name: str) -> bool:
        is_chosen = ".layers." in f".{name}" and not any(n % MULTIPLE for n in linear.weight.shape)
        chosen.extend([name] * is_chosen)
        return is_chosen

    # A weight's gradient sums over tokens, of which a micro-batch may have any number.
    settings = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(model, module_filter_fn=choose, config=settings)
    return len(chosen)
