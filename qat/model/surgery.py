"""Swapping linears and embeddings for quantized ones, and holding weights for many forwards."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from qat.grids.scalar import over_scale, times_scale
from qat.grids.scales import TensorScale
from qat.model.layers import (
    FakeQuantEmbedding,
    FakeQuantLinear,
    FakeQuantWeight,
    TiedHead,
    empty_embedding,
    empty_linear,
)
from qat.quant.plan import QuantPlan, TensorInfo, TensorKind, tensor_kind
from qat.quant.quantized_tensor import QuantizedTensor
from qat.quant.spec import TensorSpec
from qat.runtime import distributed
from qat.runtime.device import lay_out, run_recorded

WEIGHTED = (nn.Linear, nn.Embedding, FakeQuantLinear, FakeQuantEmbedding)


def model_tensors(model: nn.Module) -> dict[str, TensorInfo]:
    """Return what a plan must know of every parameter, tied ones once, in the model's order.

    Quantized layers count as the one weight that they stand for.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found: dict[str, TensorInfo] = {}
    seen: dict[int, str] = {}  # an embedding's tensor or module to its name
    for name, module in model.named_modules():
        if isinstance(module, TiedHead):
            add_alias(found, seen[id(module.tied[0])], f"{name}.weight")
            continue
        if isinstance(module, FakeQuantWeight):
            shape = (module.out_features, module.in_features)
            seen[id(module)] = f"{name}.weight"
            found[f"{name}.weight"] = TensorInfo(
                shape=shape, kind=kind_of(name, module, embedding, head), is_quantizable=True
            )
        for part, parameter in module.named_parameters(recurse=False):
            if isinstance(module, FakeQuantWeight) and part != "bias":
                continue
            full = f"{name}.{part}" if name else part
            if id(parameter) in seen:
                add_alias(found, seen[id(parameter)], full)
                continue
            seen[id(parameter)] = full
            is_weight = isinstance(module, WEIGHTED) and part == "weight"
            kind = kind_of(name, module, embedding, head) if is_weight else "other"
            found[full] = TensorInfo(
                shape=tuple(parameter.shape), kind=kind, is_quantizable=is_weight
            )
    return found


def kind_of(
    name: str, module: nn.Module, embedding: nn.Module | None, head: nn.Module | None
) -> TensorKind:
    """Return what a weight is for."""
    if module is embedding:
        return "embedding"
    return "head" if module is head else tensor_kind(name)


def add_alias(found: dict[str, TensorInfo], name: str, alias: str) -> None:
    """Note a parameter that is tied to another one."""
    found[name] = replace(found[name], aliases=(*found[name].aliases, alias))


def dense_weights(model: nn.Module, plan: QuantPlan) -> dict[str, nn.Module]:
    """Return the dense modules whose weights a plan quantizes, by name, in the model's order.

    Raises:
        ValueError: If there is none, so that no run trains a model left as it was.
    """
    found = {
        name: module
        for name in plan.quantized
        if isinstance(module := model.get_submodule(name), (nn.Linear, nn.Embedding))
    }
    if not found:
        raise ValueError(f"plan {plan.name} quantizes no weight; name a preset such as q4a4")
    return found


def replace_weights(
    model: nn.Module, plan: QuantPlan, make: Callable[[str, nn.Module, TensorSpec], nn.Module]
) -> None:
    """Swap each dense module that a plan quantizes for what `make(name, module, spec)` returns."""
    for name in list(dense_weights(model, plan)):  # so that no module outlives its turn
        put_layer(model, name, make(name, model.get_submodule(name), plan.quantized[name]))


def put_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a quantized layer under a name; a head that was tied to it computes with it."""
    previous = model.get_submodule(name)
    head = model.get_output_embeddings()
    is_tied = isinstance(layer, FakeQuantEmbedding) and is_tied_to(head, previous)
    swap(model, name, layer)
    if is_tied:
        head_name = next(found for found, module in model.named_modules() if module is head)
        swap(model, head_name, TiedHead(layer))


def is_tied_to(head: nn.Module | None, embedding: nn.Module) -> bool:
    """Return whether a head computes with an embedding's tensor."""
    if isinstance(head, TiedHead):
        return head.tied[0] is embedding
    return isinstance(head, nn.Linear) and head.weight is getattr(embedding, "weight", None)


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module under a dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def put_value(model: nn.Module, key: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter or a stored buffer, wherever it is tied to.

    Another one, as a parameter's own tensor cannot move from the meta device.
    """
    previous = model.state_dict(keep_vars=True)[key]
    is_parameter = isinstance(previous, nn.Parameter)
    value = nn.Parameter(value, requires_grad=False) if is_parameter else value
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for part in [part for part, tensor in held.items() if tensor is previous]:
                held[part] = value


def quantized_layer(module: nn.Module, quantized: QuantizedTensor) -> FakeQuantWeight:
    """Return the layer that holds a quantized weight in the place of a linear or an embedding."""
    if isinstance(module, nn.Embedding | FakeQuantEmbedding):
        return FakeQuantEmbedding.from_embedding(module, quantized)
    return FakeQuantLinear.from_linear(module, quantized)


def empty_layer(_name: str, module: nn.Module, spec: TensorSpec) -> FakeQuantWeight:
    """Return a layer of a module's sizes whose values come later, from a file."""
    if isinstance(module, nn.Embedding):
        return empty_embedding(module, spec)
    return empty_linear(module, spec)


def quantized_layers(model: nn.Module) -> dict[str, FakeQuantWeight]:
    """Return the quantized layers of a model by name, in the model's order; tied ones once."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantWeight)
    }


def quantized_tensor(layer: FakeQuantWeight) -> QuantizedTensor:
    """Return what a layer holds as its file does: indices as they are, parts as stored."""
    parts = {
        name: layer.spec.snap_part(name, values.detach())
        for name, values in stored_parts(layer).items()
    }
    return QuantizedTensor(layer.spec, current_indices(layer), parts)


def stored_parts(layer: FakeQuantWeight) -> dict[str, torch.Tensor]:
    """Return scales and codebook of a layer by name; the codebook sorted if it moves.

    Where training computes with others than it moves, such as one scale of a whole tensor, they are
    those that it computes with.
    """
    parts, form = dict(layer.parts), layer.spec.scale
    if isinstance(form, TensorScale) or form.exact_top:
        found = zip(("scale", "offset"), layer.expand(), strict=True)
        parts |= {name: t.detach().contiguous() for name, t in found if t is not None}
    if layer.latent_weight is not None and "codebook" in parts:
        parts["codebook"] = layer.codebook.sort().values
    return parts


def has_low_rank_scales(model: nn.Module) -> bool:
    """Whether a student's scales are low rank with magnitudes apart, the seeds' second form."""
    specs = [layer.spec for layer in quantized_layers(model).values()]
    return any(spec.rank and spec.floor is None for spec in specs)


def layers_of_kind(model: nn.Module, kind: TensorKind) -> dict[str, FakeQuantWeight]:
    """Return the quantized layers of one kind: mlp, attention, embedding, head or other."""
    return {name: m for name, m in quantized_layers(model).items() if tensor_kind(name) == kind}


def outer_layers(model: nn.Module) -> dict[str, FakeQuantWeight]:
    """Return the quantized layers of a model that no decoder layer has, by name."""
    inner = set(quantized_layers(model.get_decoder().layers).values())
    return {name: layer for name, layer in quantized_layers(model).items() if layer not in inner}


@torch.no_grad()
def hold_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Form each quantized weight once, in the compute dtype, for every later forward."""
    layers = quantized_layers(model)
    distributed.drop_gathered(model)
    for layer in layers.values():
        hold_weight(layer, dtype)
    if layers:
        run_recorded(next(iter(layers.values())).held_weight.device)


@torch.no_grad()
def hold_outer_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Form the quantized weights outside decoder layers once; those inside are formed in use."""
    release_weights(model)
    for layer in outer_layers(model).values():
        hold_weight(layer, dtype)


def hold_weight(layer: FakeQuantWeight, dtype: torch.dtype) -> None:
    """Form a layer's quantized weight for later forwards; they gather one that is split."""
    if isinstance(layer.held_weight, nn.Parameter):  # gathered in the compute dtype
        distributed.own_part(layer.held_weight).copy_(layer.fake_quantized_weight())
    else:
        # Whole on each chip: formed once a step from the rows of each, then read by all.
        layer.held_weight = lay_out(layer.fake_quantized_weight(dtype), split=False)


def release_weights(model: nn.Module) -> None:
    """Drop held weights: forwards form them anew from indices, scales and codebook."""
    for layer in quantized_layers(model).values():
        layer.held_weight = layer.held_values = None


@torch.no_grad()
def hold_values(layer: FakeQuantWeight) -> None:
    """Look the grid values of frozen indices up once, where no step changes them.

    As float16, which holds every stored codebook value; float32 codebooks are looked up each time.
    """
    moves = layer.latent_weight is not None or (
        layer.codebook is not None and layer.codebook.requires_grad
    )
    if not moves and layer.held_values is None and layer.spec.stored_dtype != "float32":
        values = layer.spec.grid.look_up(layer.indices, layer.stored_codebook())
        layer.held_values = values.to(torch.float16)


@torch.no_grad()
def thaw_indices(layer: FakeQuantWeight, weight: torch.Tensor | None = None) -> None:
    """Give a layer a latent weight whose nearest grid values are its frozen indices.

    A weight whose nearest value is its index's keeps its place, pulled to the grid's range where
    gradients reach it. One that error feedback moved to another cell starts at that cell's value:
    at its border it would fall back at the first step and undo the feedback.

    Args:
        layer: A layer with frozen indices.
        weight: Full-precision weight, (O, I); the cell's own value where not given.
    """
    sort_codebook(layer)
    grid, scales, codebook = layer.spec.grid, layer.expand(), layer.stored_codebook()
    latent = at_values = times_scale(grid.look_up(layer.indices, codebook), *scales)
    if weight is not None:
        weight = weight[layer.rows or slice(None)].to(at_values.device, torch.float32)
        normalized = grid.clamp(over_scale(weight, *scales), codebook)
        latent = torch.where(
            torch.isfinite(normalized), times_scale(normalized, *scales), at_values
        )
        moved = grid.round(over_scale(latent, *scales), codebook) != layer.indices
        moved = moved.repeat_interleave(grid.block_size, dim=1)
        latent = torch.where(moved, at_values, latent)
    layer.latent_weight = nn.Parameter(latent)
    layer.indices = layer.indices.new_empty(0)  # they follow from the latent weight
    layer.held_values = None


def sort_codebook(layer: FakeQuantWeight) -> None:
    """Put a layer's codebook in ascending order; its frozen indices follow."""
    if layer.codebook is None:
        return
    order = layer.stored(layer.codebook).argsort()
    layer.codebook.data = layer.codebook.data[order]
    layer.indices = order.argsort().to(torch.uint8)[layer.indices.int()]


@torch.no_grad()
def freeze_indices(layer: FakeQuantWeight) -> None:
    """Fix a layer's indices to those of its latent weight, and drop the latent weight."""
    if layer.latent_weight is None:
        return
    layer.indices = current_indices(layer)
    if layer.codebook is not None:
        layer.codebook.data = layer.codebook.data.sort().values
    layer.latent_weight = None


@torch.no_grad()
def current_indices(layer: FakeQuantWeight) -> torch.Tensor:
    """Return the indices that the next forward uses, into the sorted codebook if there is one."""
    if layer.latent_weight is None:
        return layer.indices
    codebook = layer.stored_codebook()
    codebook = None if codebook is None else codebook.sort().values
    return layer.spec.grid.round(over_scale(layer.latent_weight, *layer.expand()), codebook)


@torch.no_grad()
def keep_scales_storable(layers: Iterable[FakeQuantWeight]) -> None:
    """Pull scales that a step drove out of what files hold back into its range.

    Beyond it they have no gradient: none would ever come back.
    """
    for layer in layers:
        if any(part.requires_grad for part in layer.parts.values()):
            for name, values in layer.spec.scale.storable(layer.parts).items():
                getattr(layer, name).data.copy_(values)
