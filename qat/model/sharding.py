"""A student whose quantized layers are spread over processes: each holds some rows of every weight.

Groups and blocks of weights lie along the inputs, so the rows of a process are rounded, trained and
pulled without the others. A step forms them once; each decoder layer gathers the compute dtype as
it runs. Codebooks and the second factor of low-rank scales serve all rows: every process has them,
as it has what is dense.

    split_rows       of indices, scales, latent weights: as soon as a student is loaded
    gather_in_use    of the weights that forwards compute with: once it is known what trains

Chips that one process drives (SPMD, on XLA) hold the same rows, and the compiler gathers:

    spread_rows      of indices, scales, latent weights: once it is known what trains
"""

import torch
from torch import Tensor, nn

from qat.grids.scales import TensorScale
from qat.model.layers import FakeQuantWeight
from qat.model.surgery import hold_weights, quantized_layers
from qat.runtime import distributed
from qat.runtime.device import lay_out, run_recorded

HEAD = "output_head"
WHOLE_PARTS = ("codebook", "magnitude", "scale_b")  # have no row for each of the weight's


@torch.no_grad()
def split_rows(model: nn.Module) -> None:
    """Keep of each quantized layer the rows of this process.

    Raises:
        ValueError: If a format has one scale for all rows.
    """
    for name, layer in quantized_layers(model).items():
        if isinstance(layer.spec.scale, TensorScale):
            raise ValueError(
                f"--shard: {name} in {layer.spec.name} has one scale for all of its rows; leave "
                "out the flag, or choose another format"
            )
        layer.rows = distributed.own_rows(layer.out_features)
        layer.indices = layer.indices[layer.rows].clone()
        for part, values in layer.parts.items():
            if part not in WHOLE_PARTS:
                values.data = values.data[layer.rows].clone()


@torch.no_grad()
def spread_rows(model: nn.Module) -> None:
    """Spread the rows of a student's weights over the chips of its device, where it has several.

    Hidden states are split by sequences, as batches are: otherwise the compiler may split them by
    what it multiplies them with.
    """
    wait_for_values(model)
    for layer in quantized_layers(model).values():
        named = {"latent_weight": layer.latent_weight, "indices": layer.indices, **layer.parts}
        for name, values in named.items():
            if values is not None and values.numel():
                lay_out(values.data, split=name not in WHOLE_PARTS)
    keep_sequences_apart(model)


@torch.no_grad()
def spread_dense_rows(model: nn.Module) -> None:
    """Spread the rows of a dense model's weights over the chips of its device, as `spread_rows`."""
    wait_for_values(model)
    for parameter in model.parameters():
        lay_out(parameter.data, split=parameter.dim() > 1)
    keep_sequences_apart(model)


def wait_for_values(model: nn.Module) -> None:
    """Wait for what a device still computes of a model: a value can be split once it is there."""
    run_recorded(next(model.parameters()).device, wait=True)


def keep_sequences_apart(model: nn.Module) -> None:
    """Have hidden states split by sequences, whatever they are multiplied with."""
    for decoder_layer in model.get_decoder().layers:
        decoder_layer.register_forward_hook(split_by_sequences)


def split_by_sequences(_layer: nn.Module, _inputs: object, output: Tensor | tuple) -> None:
    """Split the hidden states that a decoder layer gives."""
    lay_out(output[0] if isinstance(output, tuple) else output, split=True)


@torch.no_grad()
def gather_in_use(model: nn.Module, dtype: torch.dtype) -> None:
    """Have forwards gather the weights of layers whose rows are split, by decoder layer.

    What trains is chosen before.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    decoder.add_module(HEAD, head)  # for this call: gathered with what no decoder layer has
    for unit in (*decoder.layers, decoder):
        inside = [module for module in unit.modules() if isinstance(module, FakeQuantWeight)]
        own = [layer for layer in inside if not isinstance(layer.held_weight, nn.Parameter)]
        for layer in own:
            hold_whole(layer)
        weights = {layer.held_weight for layer in own}
        distributed.gather_in_use(unit, weights, dtype, keeps=unit is decoder)
    delattr(decoder, HEAD)
    hold_weights(model, torch.float32)


def hold_whole(layer: FakeQuantWeight) -> None:
    """Give a layer a held weight of all rows, whose values come later, as a parameter."""
    shape, device = (layer.out_features, layer.in_features), next(layer.parameters()).device
    is_trained = any(parameter.requires_grad for parameter in layer.parameters())
    del layer.held_weight
    layer.held_weight = nn.Parameter(torch.empty(shape, device=device), requires_grad=is_trained)


def split_parameters(model: nn.Module) -> dict[Tensor, int]:
    """Return the parameters of which this process has some rows, and how many rows all have."""
    return {
        parameter: layer.out_features
        for layer in quantized_layers(model).values()
        for name, parameter in layer.named_parameters(recurse=False)
        if layer.rows is not None and name in ("latent_weight", *layer.parts)
        if name not in WHOLE_PARTS
    }


def all_rows(layer: FakeQuantWeight, part: str, values: Tensor) -> Tensor:
    """Return a part of a layer, or its indices, with the rows that other processes have."""
    if layer.rows is None or part in WHOLE_PARTS:
        return values
    return distributed.all_rows(values.detach(), layer.out_features)
