"""A student whose quantized layers are spread over processes: each holds some rows of every weight.

Groups and blocks of weights lie along the inputs, so the rows of a process are rounded, trained and
pulled without the others. A step forms them once; each decoder layer gathers the compute dtype as
it runs. Codebooks and the second factor of low-rank scales serve all rows: every process has them,
as it has what is dense.

    split_rows       of indices, scales, latent weights: as soon as a student is loaded
    gather_in_use    of the weights that forwards compute with: once it is known what trains
"""

import torch
from torch import Tensor, nn

from qat.grids.scales import TensorScale
from qat.model.layers import FakeQuantWeight
from qat.model.surgery import hold_weights, quantized_layers
from qat.runtime import distributed

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
