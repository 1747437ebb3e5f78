"""What trains: chosen by the type of a module and the part it plays, never by a piece of a name."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qat.model.layers import FakeQuantLinear
from qat.model.surgery import layers_of_kind, quantized_layers, thaw_indices
from qat.runtime.device import checkpoint_function, optimizer_settings

RUNTIME_GRIDS = ("int", "iq4_nl")
SCALE_NAMES = ("scale", "scale_a", "scale_b", "magnitude")


def choose_trainable(
    model: nn.Module,
    *,
    kinds: tuple[str, ...],
    parts: tuple[str, ...],
    weight_of: Callable[[str], Tensor | None],
) -> dict[str, list[nn.Parameter]]:
    """Freeze a student but for the chosen parts of the chosen layers.

    Args:
        model: A student; layers whose weights train get latent ones.
        kinds: mlp, attention or both.
        parts: Of weights, scales, magnitudes, codebooks, norms.
        weight_of: Returns the full-precision weight of a layer by name, None where unknown.

    Returns:
        Parameters by part, those parts only that have any.

    Raises:
        ValueError: If nothing is left to train.
    """
    model.requires_grad_(False)
    layers = {name: layer for kind in kinds for name, layer in layers_of_kind(model, kind).items()}
    chosen: dict[str, list[nn.Parameter]] = {part: [] for part in parts}
    for name, layer in layers.items():
        if "weights" in parts:
            if layer.latent_weight is None:
                thaw_indices(layer, weight_of(name))
            chosen["weights"].append(layer.latent_weight)
        for part in ("scales", "magnitudes", "codebooks"):
            if part in parts and not (part == "magnitudes" and "scales" in parts):  # once is enough
                chosen[part] += parameters_of(layer, part)
    if "norms" in parts:
        chosen["norms"] += norm_parameters(model)
    chosen = {part: parameters for part, parameters in chosen.items() if parameters}
    if not chosen:
        raise ValueError(
            f"--trainable {' '.join(parts)} finds nothing in the student's {' and '.join(kinds)} "
            "layers; magnitudes are there with low-rank scales only"
        )
    for parameters in chosen.values():
        for parameter in parameters:
            parameter.requires_grad_(True)
    return chosen


def parameters_of(layer: FakeQuantLinear, part: str) -> list[nn.Parameter]:
    """Return a layer's parameters of one part; all scale factors count as scales.

    The codebooks of runtimes' grids are what their files cannot change, so they stay.
    """
    if part == "codebooks" and layer.scheme.codebook in RUNTIME_GRIDS:
        return []
    names = {"scales": SCALE_NAMES, "magnitudes": ("magnitude",), "codebooks": ("codebook",)}[part]
    return [parameter for name, parameter in layer.named_parameters() if name in names]


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of norms as float32 parameters; what norms give keeps its dtype."""
    norms = [m for m in model.modules() if "Norm" in type(m).__name__ and hasattr(m, "weight")]
    for norm in norms:
        norm.weight = nn.Parameter(norm.weight.detach().float())
        norm.register_forward_hook(in_dtype_of_input)
    return [norm.weight for norm in norms]


def in_dtype_of_input(_norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return a norm's output in the compute dtype: float32 weights would have widened it."""
    return output.to(inputs[0].dtype)


def freeze_magnitudes(model: nn.Module, chosen: dict[str, list[nn.Parameter]]) -> None:
    """Take the magnitudes of low-rank scales out of what trains."""
    for layer in quantized_layers(model).values():
        if layer.scheme.rank:
            layer.magnitude.requires_grad_(False)
    for part in chosen:
        chosen[part] = [parameter for parameter in chosen[part] if parameter.requires_grad]


def trained_layers(model: nn.Module) -> list[FakeQuantLinear]:
    """Return the quantized layers that have something to train."""
    return [
        layer
        for layer in quantized_layers(model).values()
        if any(parameter.requires_grad for name, parameter in layer.named_parameters())
    ]


def count_parameters(chosen: dict[str, list[nn.Parameter]]) -> dict[str, int]:
    """Return the number of trained numbers by part."""
    return {part: sum(p.numel() for p in parameters) for part, parameters in chosen.items()}


def make_optimizer(
    chosen: dict[str, list[nn.Parameter]], rates: dict[str, float], weight_decay: float
) -> torch.optim.Optimizer:
    """Return AdamW with one group of parameters a part.

    Args:
        chosen: Parameters by part.
        rates: Peak learning rate by part.
        weight_decay: Of latent weights; other parts have none.
    """
    groups = [
        {
            "params": parameters,
            "lr": rates[part],
            "peak_lr": rates[part],
            "weight_decay": weight_decay if part == "weights" else 0.0,
        }
        for part, parameters in chosen.items()
    ]
    device = next(iter(chosen.values()))[0].device
    return torch.optim.AdamW(groups, **optimizer_settings(device))


def set_training_mode(model: nn.Module, *, gradient_checkpointing: bool) -> None:
    """Prepare a model for steps: recomputed activations where asked, no cache of keys."""
    if gradient_checkpointing:
        model.train()
        function = checkpoint_function(next(model.parameters()).device)
        model._set_gradient_checkpointing(True, function)
        model.enable_input_require_grads()
