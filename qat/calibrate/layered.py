"""Second moments of a model's inputs, with one decoder layer in memory at a time.

Shape legend: B batch, T tokens, D hidden size, I in.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from qat.calibrate.decoder_layers import Stream, around_layers, layer_calls
from qat.calibrate.statistics import Batch, SquareSums
from qat.model.head import Tokens
from qat.model.layered import LayeredModel
from qat.runtime.device import Device


@torch.no_grad()
def walk_second_moments(
    layered: LayeredModel,
    linears: Collection[str],
    batches: Sequence[Batch],
    *,
    head: str | None = None,
    device: Device,
) -> Iterator[tuple[str | None, dict[str, Tensor]]]:
    """Yield each decoder layer's name with the mean squares of its linears' inputs, (I,) float32.

    They are those of `collect_second_moments` to the bit; no weight is in memory meanwhile.

    Args:
        layered: The model.
        linears: Names of the linears to watch, all in decoder layers.
        batches: Token ids, (B, T) each; `Tokens` where documents are packed.
        head: Name under which the head's inputs are yielded last, with None for the layer.
        device: Where the layers compute.

    Raises:
        NeedsWhole: If the model does more between decoder layers than pass hidden states on.
        ValueError: If a statistic is not finite.
    """
    placed = [Tokens.of(batch).to(device.torch_device) for batch in batches]
    num_tokens = sum(batch.token_ids.numel() for batch in placed)
    stream = begin_stream(layered, placed, device)
    for name in layered.layers:
        layer, sums = layered.model.get_submodule(name), SquareSums()
        watched = [linear for linear in linears if linear.startswith(f"{name}.")]
        with layered.loaded(keys_in(layered, layer)), ExitStack() as hooks:
            hooks.enter_context(device.hosting(layer))
            for linear in watched:
                module = layered.model.get_submodule(linear)
                hooks.enter_context(module.register_forward_pre_hook(sums.watch(linear)))
            stream.advance(name, layer)
            sums.forget()
        yield name, on_cpu(sums.means(num_tokens))
    if head is not None:
        norm, sums = layered.model.get_decoder().norm, SquareSums()
        with opened(layered, device, norm):
            for hidden in stream.hidden:
                sums.add(head, norm(hidden))
        yield None, on_cpu(sums.means(num_tokens))


def keys_in(layered: LayeredModel, module: nn.Module) -> list[str]:
    """Return the names of a module's tensors in the model, tied ones once."""
    inside = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    return [key for key, tensor in layered.tensors().items() if id(tensor) in inside]


def on_cpu(moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return moments in the host's memory."""
    return {name: moment.cpu() for name, moment in moments.items()}


@contextmanager
def opened(layered: LayeredModel, device: Device, *parts: nn.Module) -> Iterator[None]:
    """Have values of some modules on a device inside the block, and none afterwards."""
    keys = [key for part in parts for key in keys_in(layered, part)]
    with layered.loaded(keys), ExitStack() as stack:
        for part in parts:
            stack.enter_context(device.hosting(part))
        yield


def begin_stream(layered: LayeredModel, batches: Sequence[Tokens], device: Device) -> Stream:
    """Return hidden states before the first decoder layer, and each layer's other arguments."""
    stream = Stream([], [])
    with opened(layered, device, *around_layers(layered.model)):
        for batch in batches:
            hidden, calls = layer_calls(layered.model, batch)
            stream.hidden.append(hidden)
            stream.arguments.append(dict(zip(layered.layers, calls, strict=True)))
    return stream
