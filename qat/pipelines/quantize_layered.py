"""A full-precision model to a student of which neither is ever in memory whole.

Each decoder layer is read from the weight files, computes, and is dropped; each of its weights is
read again, fitted, and kept as the file holds it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qat.calibrate.layered import walk_second_moments
from qat.model.checkpoint import dense_targets, dense_tensors, layer_tensors, smallest_lossless
from qat.model.head import Tokens
from qat.model.layered import LayeredModel, NeedsWhole, put_value
from qat.model.surgery import empty_layer, put_layer, quantized_layer
from qat.pipelines.fit_layers import FitTask, head_weight
from qat.quant.plan import QuantPlan
from qat.runtime.device import Device


@torch.no_grad()
def fit_layered(
    layered: LayeredModel,
    plan: QuantPlan,
    batches: Sequence[Tokens],
    row_weights: Mapping[str, Tensor],
    device: Device,
) -> dict[str, Tensor]:
    """Return what the file of a fitted student holds, by name.

    The layered model becomes the student: its dense parts have values in the smallest lossless
    dtype, its quantized weights sizes only.

    Args:
        layered: The full-precision model.
        plan: Format of every tensor.
        batches: Text that calibrates; none = every weight counts alike.
        row_weights: As `FitTask` has them.
        device: Where decoder layers compute; fits are made on the CPU.

    Raises:
        NeedsWhole: If the model cannot be taken layer by layer.
        ValueError: If a weight is not finite, or a format does not hold it.
    """
    task = FitTask(specs=plan.quantized, weight_of=layered.weight, row_weights=row_weights)
    head = head_weight(layered.model, task.specs)
    check(layered, task)
    linears = linears_in_layers(layered, task, head)
    walk = walk_second_moments(layered, linears, batches, head=head, device=device)
    found = walk if batches else [(name, {}) for name in layered.layers]
    tensors: dict[str, Tensor] = {}
    with tqdm(total=len(task.specs), desc="fit", unit="layer") as progress:

        def fit(name: str, moment: Tensor | None) -> None:
            progress.set_postfix_str(name.removeprefix("model.layers."), refresh=False)
            module = layered.model.get_submodule(name)
            made = quantized_layer(module, task.fit(name, moment))
            tensors.update(layer_tensors(name, made))
            with torch.device("meta"):
                shell = empty_layer(name, module, task.specs[name])
            put_layer(layered.model, name, shell)
            progress.update()

        last: dict[str, Tensor] = {}
        for layer, moments in found:
            if layer is None:
                last = moments
            for name in [one for one in task.specs if layer and one.startswith(f"{layer}.")]:
                fit(name, moments.get(name))
        for name in [one for one in task.specs if not in_layers(layered, one)]:
            fit(name, last.get(name))
    for key in dense_targets(layered.model):
        put_value(layered.model, key, smallest_lossless(layered.read(key)))
    return tensors | dense_tensors(layered.model)


def check(layered: LayeredModel, task: FitTask) -> None:
    """Read all weights once and refuse what cannot be taken, before any long work."""
    for key in layered.tensors():
        if key.removesuffix(".weight") not in task.specs:
            layered.read(key)
    task.check()


def in_layers(layered: LayeredModel, name: str) -> bool:
    """Whether a module is in one of the decoder layers."""
    return any(name.startswith(f"{layer}.") for layer in layered.layers)


def linears_in_layers(layered: LayeredModel, task: FitTask, head: str | None) -> list[str]:
    """Return the names of the linears to fit; refuse those whose inputs no decoder layer shows."""
    linears = [
        name
        for name in task.specs
        if name != head and isinstance(layered.model.get_submodule(name), nn.Linear)
    ]
    for name in linears:
        if not in_layers(layered, name):
            raise NeedsWhole(f"{name} is in no decoder layer")
    return linears
