"""A full-precision model to a student: every layer fitted to its weight and its inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qat.model.layers import FakeQuantLinear
from qat.model.surgery import check_scheme, quantizable_linears, replace_linears
from qat.pipelines.fit_layers import fit_by_blocks
from qat.quant.fit import fit_weight
from qat.quant.scheme import LayerScheme, Scheme


def init_student(
    model: nn.Module, scheme: Scheme, *, importance: dict[str, Tensor] | None = None
) -> None:
    """Turn a full-precision model into a student in place.

    Args:
        model: Causal LM; its linears are replaced.
        scheme: How each kind of layer is quantized.
        importance: Second moments of each linear's inputs by name, (I,); equal when not given.

    Raises:
        ValueError: If the scheme does not fit a layer or a weight cannot be held; names the layer.
    """
    check_scheme(model, scheme)
    progress = tqdm(total=len(quantizable_linears(model, scheme)), desc="fit", unit="layer")

    def make(name: str, linear: nn.Linear, layer_scheme: LayerScheme) -> FakeQuantLinear:
        progress.set_postfix_str(name.removeprefix("model.layers."), refresh=False)
        layer = fit_linear(name, linear, layer_scheme, importance and importance.get(name))
        progress.update()
        return layer

    replace_linears(model, scheme, make)
    progress.close()
    model.requires_grad_(False)


def init_student_by_blocks(
    model: nn.Module,
    scheme: Scheme,
    batches: Sequence[Tensor],
    *,
    token_weights: dict[str, list[Tensor]] | None = None,
    dtype: torch.dtype,
) -> None:
    """Turn a full-precision model into a student in place, each layer fed by quantized ones.

    Args:
        model: Causal LM; its linears are replaced.
        scheme: How each kind of layer is quantized.
        batches: Token ids, (B, T) each, on the model's device.
        token_weights: How much each token counts for each linear, as `walk_blocks` takes it.
        dtype: Compute dtype.

    Raises:
        ValueError: If the scheme does not fit a layer or a weight cannot be held; names the layer.
    """
    check_scheme(model, scheme)
    linears = quantizable_linears(model, scheme)
    fit_by_blocks(
        model,
        {name: scheme.layer(name) for name in linears},
        batches,
        weight_of=lambda name: linears[name].weight,
        token_weights=token_weights,
        dtype=dtype,
    )


@torch.no_grad()
def fit_linear(
    name: str, linear: nn.Linear, scheme: LayerScheme, importance: Tensor | None
) -> FakeQuantLinear:
    """Return the quantized layer of a linear; errors name it."""
    try:
        quantized = fit_weight(linear.weight, scheme, importance=importance)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return FakeQuantLinear.from_linear(linear, quantized, scheme)
