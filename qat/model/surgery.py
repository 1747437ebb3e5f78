"""Swapping linears for quantized ones, and holding their weights for many forwards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qat.grids.scalar import nearest_indices, over_scale, times_scale
from qat.grids.scales import stored_scale
from qat.model.layers import FakeQuantLinear
from qat.quant.scheme import LayerScheme, Scheme, layer_kind
from qat.quant.straight_through import codebook_range
from qat.runtime.device import run_recorded


def quantizable_linears(model: nn.Module, scheme: Scheme) -> dict[str, nn.Linear]:
    """Return the linears that a scheme quantizes, by name, in the model's order.

    Raises:
        ValueError: If the model has none, so that no run trains a model left as it was.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and scheme.layer(name) is not None
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear named q_proj, k_proj, v_proj, o_proj, "
            "gate_proj, up_proj or down_proj; this model family is not supported"
        )
    return found


def check_scheme(model: nn.Module, scheme: Scheme) -> None:
    """Refuse a scheme that does not fit one of the model's layers, naming the layer."""
    for name, linear in quantizable_linears(model, scheme).items():
        layer_scheme = scheme.layer(name)
        try:
            if layer_scheme.rank > min(linear.weight.shape):
                raise ValueError(
                    f"rank {layer_scheme.rank} exceeds {min(linear.weight.shape)}, "
                    "its smaller side; choose less"
                )
            if not layer_scheme.rank:
                layer_scheme.groups_of(linear.in_features)
        except ValueError as error:
            raise ValueError(f"scheme {scheme.name} does not fit {name}: {error}") from error


def replace_linears(
    model: nn.Module, scheme: Scheme, make: Callable[[str, nn.Linear, LayerScheme], FakeQuantLinear]
) -> None:
    """Swap each quantizable linear of a model for what `make(name, linear, scheme)` returns."""
    for name, linear in quantizable_linears(model, scheme).items():
        swap(model, name, make(name, linear, scheme.layer(name)))


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module under a dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def empty_layer(name: str, linear: nn.Linear, scheme: LayerScheme) -> FakeQuantLinear:
    """Return a layer of a linear's sizes whose values come later, from a file."""
    return FakeQuantLinear(
        linear.in_features, linear.out_features, scheme, has_bias=linear.bias is not None
    )


def quantized_layers(model: nn.Module) -> dict[str, FakeQuantLinear]:
    """Return the quantized layers of a model by name, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantLinear)
    }


def has_low_rank_scales(model: nn.Module) -> bool:
    """Whether a student's scales are low rank with magnitudes apart, the seeds' second form."""
    schemes = [layer.scheme for layer in quantized_layers(model).values()]
    return any(scheme.rank and scheme.scale_floor is None for scheme in schemes)


def layers_of_kind(model: nn.Module, kind: str) -> dict[str, FakeQuantLinear]:
    """Return the quantized layers of one kind: mlp or attention."""
    return {name: m for name, m in quantized_layers(model).items() if layer_kind(name) == kind}


@torch.no_grad()
def hold_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Form each quantized weight once, in the compute dtype, for every later forward."""
    layers = quantized_layers(model)
    for layer in layers.values():
        layer.held_weight = layer.fake_quantized_weight(dtype)
    if layers:
        run_recorded(next(iter(layers.values())).held_weight.device)


def release_weights(model: nn.Module) -> None:
    """Drop held weights: forwards form them anew from indices, scales and codebook."""
    for layer in quantized_layers(model).values():
        layer.held_weight = None


@contextmanager
def held_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold weights inside the block; put back what was held before."""
    former = {layer: layer.held_weight for layer in quantized_layers(model).values()}
    hold_weights(model, dtype)
    try:
        yield
    finally:
        for layer, weight in former.items():
            layer.held_weight = weight


@torch.no_grad()
def thaw_indices(layer: FakeQuantLinear, weight: torch.Tensor | None = None) -> None:
    """Give a layer a latent weight whose nearest codebook values are its frozen indices.

    A weight whose nearest value is its index's keeps its place, pulled to the codebook's range
    where gradients reach it. One that error feedback moved to another cell starts at that cell's
    value: at its border it would fall back at the first step and undo the feedback.

    Args:
        layer: A layer with frozen indices.
        weight: Full-precision weight, (O, I); the cell's own value where not given.
    """
    scale = layer.full_scale()
    codebook = layer.stored(layer.codebook)
    order = codebook.argsort()
    layer.codebook.data = layer.codebook.data[order]
    layer.indices = order.argsort().to(torch.uint8)[layer.indices.int()]
    codebook = codebook[order]
    values = codebook[layer.indices.int()]
    latent = at_values = times_scale(values, scale)
    if weight is not None:
        low, high = codebook_range(codebook)
        weight = weight.to(scale.device, torch.float32)
        normalized = over_scale(weight, scale).clamp(low, high)
        latent = torch.where(torch.isfinite(normalized), times_scale(normalized, scale), at_values)
        moved = nearest_indices(over_scale(latent, scale), codebook) != layer.indices
        latent = torch.where(moved, at_values, latent)
    layer.latent_weight = nn.Parameter(latent)


@torch.no_grad()
def freeze_indices(layer: FakeQuantLinear) -> None:
    """Fix a layer's indices to those of its latent weight, and drop the latent weight."""
    if layer.latent_weight is None:
        return
    layer.indices = current_indices(layer)
    layer.codebook.data = layer.codebook.data.sort().values
    layer.latent_weight = None


@torch.no_grad()
def current_indices(layer: FakeQuantLinear) -> torch.Tensor:
    """Return the indices that the next forward uses, (O, I) uint8, into the sorted codebook."""
    if layer.latent_weight is None:
        return layer.indices
    codebook = layer.stored(layer.codebook).sort().values
    return nearest_indices(over_scale(layer.latent_weight, layer.full_scale()), codebook)


@torch.no_grad()
def keep_scales_storable(model: nn.Module) -> None:
    """Pull group scales that training drove to zero or beyond float16 back into its range."""
    for layer in quantized_layers(model).values():
        if not layer.scheme.rank:
            layer.scale.data.copy_(
                stored_scale(layer.scale.data).where(
                    (layer.scale.data <= 0) | ~torch.isfinite(layer.scale.half()), layer.scale.data
                )
            )
