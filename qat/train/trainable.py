"""What trains: chosen by the type of a module and the part it plays, never by a piece of a name."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from qat.model.layers import FakeQuantWeight
from qat.model.surgery import layers_of_kind, quantized_layers, thaw_indices
from qat.runtime.device import (
    checkpoint_function,
    is_traced,
    optimizer_settings,
    waits_for_python,
)
from qat.runtime.distributed import total
from qat.train.config import Averages, Compile

SUPER_NAMES = ("super_scale", "sub_scale", "super_offset", "sub_offset")
DIRECTION_NAMES = ("scale", "offset", *SUPER_NAMES, "scale_a", "scale_b")
PART_NAMES = {
    "scales": (*DIRECTION_NAMES, "magnitude"),
    "directions": DIRECTION_NAMES,
    "magnitudes": ("magnitude",),
    "codebooks": ("codebook",),
}


def choose_trainable(
    model: nn.Module,
    *,
    kinds: tuple[str, ...],
    parts: tuple[str, ...],
    weight_of: Callable[[str], Tensor | None],
    formats: tuple[str, ...] | None = None,
) -> dict[str, list[nn.Parameter]]:
    """Freeze a student but for the chosen parts of the chosen layers.

    Args:
        model: A student; layers whose weights train get latent ones.
        kinds: Of the layers that train, as `tensor_kind` names them.
        parts: Of weights, scales, directions, magnitudes, codebooks, norms.
        weight_of: Returns the full-precision weight of a layer by name, None where unknown.
        formats: Names of those whose layers train; None = all.

    Returns:
        Parameters by part, those parts only that have any.

    Raises:
        ValueError: If nothing is left to train.
    """
    model.requires_grad_(False)
    layers = layers_to_train(model, kinds, formats)
    chosen: dict[str, list[nn.Parameter]] = {part: [] for part in parts}
    for name, layer in layers.items():
        if "weights" in parts:
            if layer.latent_weight is None:
                thaw_indices(layer, weight_of(name))
            chosen["weights"].append(layer.latent_weight)
        for part in PART_NAMES:
            if part in parts and not (part == "magnitudes" and "scales" in parts):  # once is enough
                chosen[part] += parameters_of(layer, part)
    if "norms" in parts:
        chosen["norms"] += norm_parameters(model)
    chosen = {part: parameters for part, parameters in chosen.items() if parameters}
    if not chosen:
        of_formats = "" if formats is None else f" in {', '.join(formats)}"
        raise ValueError(
            f"--trainable {' '.join(parts)} finds nothing in the student's {' and '.join(kinds)} "
            f"layers{of_formats}; magnitudes are there with low-rank scales only"
        )
    for parameters in chosen.values():
        for parameter in parameters:
            parameter.requires_grad_(True)
    return chosen


def choose_dense(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Let all of a model train; return its matrices as weights and its vectors as norms.

    Parameters by part, as `choose_trainable` gives them: weights decay, norms and biases do not.
    """
    model.requires_grad_(True)
    chosen: dict[str, list[nn.Parameter]] = {"weights": [], "norms": []}
    for parameter in model.parameters():  # tied ones once
        chosen["weights" if parameter.dim() > 1 else "norms"].append(parameter)
    return {part: parameters for part, parameters in chosen.items() if parameters}


def layers_to_train(
    model: nn.Module, kinds: tuple[str, ...], formats: tuple[str, ...] | None
) -> dict[str, FakeQuantWeight]:
    """Return the quantized layers of some kinds, in some formats (None = all)."""
    return {
        name: layer
        for kind in kinds
        for name, layer in layers_of_kind(model, kind).items()
        if formats is None or layer.spec.name in formats
    }


def parameters_of(layer: FakeQuantWeight, part: str) -> list[nn.Parameter]:
    """Return a layer's parameters of one part; all scale factors count as scales.

    The codebooks of runtimes' grids are what their files cannot change, so they stay.
    """
    if part == "codebooks" and layer.spec.has_fixed_values:
        return []
    return [p for name, p in layer.named_parameters() if name in PART_NAMES[part]]


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of norms as float32 parameters; what norms give keeps its dtype.

    A norm is a module whose own weight is a vector: linears, embeddings and convolutions have a
    matrix or more, whatever their class is called.
    """
    norms = [m for m in model.modules() if getattr(m._parameters.get("weight"), "ndim", 0) == 1]
    for norm in norms:
        norm.weight = nn.Parameter(norm.weight.detach().float())
        norm.register_forward_hook(in_dtype_of_input)
    return [norm.weight for norm in norms]


def in_dtype_of_input(_norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return a norm's output in the compute dtype: float32 weights would have widened it."""
    return output.to(inputs[0].dtype)


def trained_layers(model: nn.Module) -> list[FakeQuantWeight]:
    """Return the quantized layers that have something to train."""
    return [layer for layer in quantized_layers(model).values() if is_trained(layer)]


def is_trained(layer: FakeQuantWeight) -> bool:
    """Return whether anything of a layer trains."""
    return any(parameter.requires_grad for parameter in layer.parameters())


@torch.no_grad()
def rate_units(model: nn.Module) -> dict[nn.Parameter, float]:
    """Return what relative learning rates of a model's trained parameters are shares of.

    Of latent weights the root mean square of their rounding errors, those at grid values left out:
    a cell of 2 bits is many times as wide as one of 8. Of all else its own, as scales of scales are
    a hundredth of scales and their integers a thousand times as large.
    """
    units = {p: root_mean_square(p) for p in model.parameters() if p.requires_grad}
    for layer in trained_layers(model):
        if layer.latent_weight in units:
            error = layer.latent_weight - layer.fake_quantized_weight(torch.float32)
            if size := mean_size(error.square().sum(), error.count_nonzero()):
                units[layer.latent_weight] = size
    return units


def root_mean_square(values: Tensor) -> float:
    """Return the root mean square of values; one where all are zero."""
    return mean_size(values.square().sum(), torch.tensor(values.numel())) or 1.0


def mean_size(squares: Tensor, count: Tensor) -> float:
    """Return the root of a mean of squares, of the values that all processes have."""
    both = total(torch.stack([squares, count.to(squares)]))
    return float((both[0] / both[1].clamp_min(1)).sqrt())


def make_optimizer(
    chosen: dict[str, list[nn.Parameter]],
    rates: dict[str, float],
    weight_decay: float = 0.0,
    units: Mapping[nn.Parameter, float] | None = None,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    averages: Averages | None = None,
) -> torch.optim.Optimizer:
    """Return AdamW with one group of parameters a part; with units, one a parameter."""

    def group(part: str, parameters: list[nn.Parameter], unit: float = 1.0) -> dict[str, Any]:
        rate = rates[part] * unit
        decay = weight_decay if part == "weights" else 0.0
        return {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay}

    if units is None:
        groups = [group(part, parameters) for part, parameters in chosen.items()]
    else:
        groups = [group(part, [p], units[p]) for part, some in chosen.items() for p in some]
    device = next(iter(chosen.values()))[0].device
    if averages is None:
        return torch.optim.AdamW(groups, betas=betas, **optimizer_settings(device))
    from qat.train.adamw_8bit import AdamW8bitInRows  # takes torchao

    return AdamW8bitInRows(groups, betas=betas)


def check_averages(averages: Averages | None, device: torch.device) -> None:
    """Refuse averages of 8 bits where they cannot be had."""
    if averages is None:
        return
    if is_traced(device):
        raise ValueError(f"--optim.averages 8bit: there is no such step on {device}; leave it out")
    if find_spec("torchao") is None:
        raise ValueError(
            "--optim.averages 8bit: torchao is not installed; pip install '.[torchao]'"
        )


def compile_decoder_layers(model: nn.Module, choice: Compile) -> None:
    """Have each decoder layer run as a compiled program, one for all that are alike, if asked for.

    What is around them stays as it is: logits are formed in chunks.
    """
    device = next(model.parameters()).device
    if choice == "on" or (choice == "auto" and waits_for_python(device)):
        for layer in model.get_decoder().layers:
            layer.compile()


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward pass, whenever the model is in training mode."""
    function = checkpoint_function(next(model.parameters()).device)
    model._set_gradient_checkpointing(True, function)
    model.enable_input_require_grads()


@contextmanager
def mode(model: nn.Module, *, is_training: bool) -> Iterator[None]:
    """Have a model in training or evaluation mode inside the block; put every module's back."""
    previous = [(module, module.training) for module in model.modules()]
    model.train(is_training)
    try:
        yield
    finally:
        for module, was_training in previous:
            module.training = was_training
