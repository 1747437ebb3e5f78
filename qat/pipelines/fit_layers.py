"""Layers fitted one transformer block at a time, each fed by the quantized layers before it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qat.calibrate.statistics import walk_blocks
from qat.model.layers import FakeQuantLinear
from qat.model.surgery import release_weights, swap
from qat.quant.fit import check_weight
from qat.quant.hessian import fit_with_hessian
from qat.quant.scheme import LayerScheme


def check_weights(linears: dict[str, nn.Module], scheme_of: Callable[[str], LayerScheme]) -> None:
    """Refuse weights that a scheme cannot hold, naming the layer, before any long work."""
    for name, linear in linears.items():
        try:
            check_weight(linear.weight, scheme_of(name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


@torch.no_grad()
def fit_by_blocks(
    model: nn.Module,
    schemes: dict[str, LayerScheme],
    batches: Sequence[Tensor],
    *,
    weight_of: Callable[[str], Tensor],
    reference: nn.Module | None = None,
    token_weights: dict[str, list[Tensor]] | None = None,
    dtype: torch.dtype,
) -> None:
    """Put fitted layers in the place of a model's linears, in the order of its forward pass.

    Args:
        model: Causal LM; quantized layers that it has already hold their weights.
        schemes: Of each linear to fit, by name.
        batches: Token ids, (B, T) each, on the model's device.
        weight_of: Returns the full-precision weight, (O, I), of a linear's name.
        reference: The full-precision model; the model itself as it comes when not given.
        token_weights: How much each token counts for each linear, as `walk_blocks` takes it.
        dtype: Compute dtype of the walk.

    Raises:
        ValueError: If a layer cannot be fitted; names the layer.
    """
    progress = tqdm(total=len(schemes), desc="fit", unit="layer")
    walk = walk_blocks(model, schemes, batches, reference=reference, token_weights=token_weights)
    for names, statistics in walk:
        for name in names:
            progress.set_postfix_str(name.removeprefix("model.layers."), refresh=False)
            try:
                quantized = fit_with_hessian(
                    weight_of(name), schemes[name], statistics.hessian, drift=statistics.drift
                )
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            layer = FakeQuantLinear.from_linear(model.get_submodule(name), quantized, schemes[name])
            layer.held_weight = layer.fake_quantized_weight(dtype)
            swap(model, name, layer)
            progress.update()
    progress.close()
    release_weights(model)
    model.requires_grad_(False)
