"""A full-precision model to a student of which neither is ever in memory whole.

Each decoder layer is read from the weight files, computes, and is dropped; each of its weights is
read again, fitted, and kept as the file holds it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qat.calibrate.decoder_layers import walk_decoder_layers
from qat.calibrate.layered import begin_stream, keys_in, walk_second_moments
from qat.model.checkpoint import dense_targets, dense_tensors, layer_tensors, smallest_lossless
from qat.model.head import Tokens
from qat.model.layered import LayeredModel, NeedsWhole
from qat.model.surgery import empty_layer, put_layer, put_value, quantized_layer
from qat.pipelines.fit_layers import FitTask, fit_by_decoder_layers, head_weight
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
    return tensors | read_dense(layered)


@torch.no_grad()
def fit_layered_against(
    layered: LayeredModel,
    plan: QuantPlan,
    batches: Sequence[Tokens],
    row_weights: Mapping[str, Tensor],
    device: Device,
    num_sweeps: int,
) -> dict[str, Tensor]:
    """Return the same of a fit against H of all inputs, which the layers fitted before feed.

    No gradient goes through the whole model, so no linear is fitted in turns.

    Args:
        layered: As in `fit_layered`, like plan, row_weights and the errors.
        plan: Format of every tensor.
        batches: Text that calibrates.
        row_weights: As `FitTask` has them.
        device: Where decoder layers compute and are fitted.
        num_sweeps: Of a fit.
    """
    task = FitTask(
        specs=plan.quantized,
        weight_of=layered.weight,
        row_weights=row_weights,
        num_sweeps=num_sweeps,
    )
    check(layered, task)
    linears = linears_in_layers(layered, task, head_weight(layered.model, task.specs))
    tensors: dict[str, Tensor] = {}

    def take_out(names: Iterable[str]) -> None:
        for name in names:
            made = layered.model.get_submodule(name)
            made.held_weight = None
            tensors.update(layer_tensors(name, made))
            made.to("meta")  # its sizes stay

    @contextmanager
    def opened(name: str) -> Iterator[None]:
        part = layered.model.get_submodule(name)
        with layered.loaded(keys_in(layered, part)):
            with device.hosting(part):
                yield
            take_out(one for one in linears if one.startswith(f"{name}."))

    placed = [batch.to(device.torch_device) for batch in batches]
    stream = begin_stream(layered, placed, device)
    walk = partial(walk_decoder_layers, stream=stream, opened=opened)
    fit_by_decoder_layers(layered.model, task, placed, dtype=layered.dtype, walk_layers=walk)
    take_out(name for name in task.specs if name not in linears)
    return tensors | read_dense(layered)


def read_dense(layered: LayeredModel) -> dict[str, Tensor]:
    """Give what stays dense its values in the smallest lossless dtype; return them by name."""
    for key in dense_targets(layered.model):
        put_value(layered.model, key, smallest_lossless(layered.read(key)))
    return dense_tensors(layered.model)


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
