"""A 4-bit student to a 2-bit one: MLP layers fitted anew, attention layers kept to the bit."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qat.convert.by_blocks import fit_by_blocks
from qat.convert.config import ConvertQ4ToQ2Config
from qat.model.linear import FakeQuantLinear
from qat.model.surgery import hold_weights, layers_of_kind, swap
from qat.quant.fit import fit_weight
from qat.quant.scheme import LayerScheme, Scheme, int_layer, with_mlp


def q2_scheme(scheme: Scheme, config: ConvertQ4ToQ2Config) -> Scheme:
    """Return the scheme after the conversion: the MLP's new one, attention as it was."""
    bits, rank, codebook = config.q2_mlp_bits, config.q2_mlp_rank, config.q2_mlp_codebook
    layer = int_layer(bits) if codebook == "int" else LayerScheme(bits=bits)
    group_size = config.q2_mlp_group_size or layer.group_size
    size = f"r{rank}" if rank else f"g{group_size}"
    kind = "" if codebook == "learned" else f"_{codebook}"
    return with_mlp(
        scheme,
        f"q{bits}a{scheme.attention.bits}{kind}_{size}",
        bits=bits,
        group_size=group_size,
        rank=rank,
        codebook=codebook,
    )


def mlp_linears(base: nn.Module, student: nn.Module) -> dict[str, nn.Linear]:
    """Return the base model's linear for each MLP layer of a student, by name.

    Raises:
        ValueError: If the base model has no such layer or one of another shape; names it.
    """
    linears = dict(base.named_modules())
    for name, layer in layers_of_kind(student, "mlp").items():
        wanted = (layer.out_features, layer.in_features)
        found = tuple(linears[name].weight.shape) if name in linears else None
        if found != wanted:
            raise ValueError(
                f"{name} has shape {wanted} in the student and {found or 'no match'} in the "
                "full-precision model; give the model it was made from with --model-id"
            )
    return {name: linears[name] for name in layers_of_kind(student, "mlp")}


@torch.no_grad()
def convert_mlp_layers(
    student: nn.Module,
    scheme: LayerScheme,
    *,
    weight_of: Callable[[str, FakeQuantLinear], Tensor],
    importance: dict[str, Tensor] | None = None,
) -> int:
    """Fit the MLP layers of a student to fewer bits, in place.

    Args:
        student: A student with frozen indices.
        scheme: Of the MLP layers from now on.
        weight_of: Returns the weight to fit, (O, I), for a layer's name and its 4-bit form.
        importance: Second moments of each layer's inputs by name, (I,).

    Returns:
        The number of layers fitted.
    """
    layers = layers_of_kind(student, "mlp")
    for name, layer in tqdm(layers.items(), desc="convert", unit="layer"):
        try:
            quantized = fit_weight(
                weight_of(name, layer), scheme, importance=importance and importance.get(name)
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        swap(student, name, FakeQuantLinear.from_linear(layer, quantized, scheme))
    return len(layers)


@torch.no_grad()
def convert_mlp_layers_by_blocks(
    student: nn.Module,
    base: nn.Module,
    linears: dict[str, nn.Linear],
    scheme: LayerScheme,
    batches: Sequence[Tensor],
    *,
    dtype: torch.dtype,
) -> int:
    """Fit the MLP layers of a student to fewer bits, in place, each fed by those before it.

    Args:
        student: A student with frozen indices.
        base: The full-precision model, whose outputs are wanted.
        linears: Its MLP layers by name.
        scheme: Of the MLP layers from now on.
        batches: Token ids, (B, T) each, on the device of both models.
        dtype: Compute dtype.

    Returns:
        The number of layers fitted.
    """
    hold_weights(student, dtype)
    fit_by_blocks(
        student,
        dict.fromkeys(linears, scheme),
        batches,
        weight_of=lambda name: linears[name].weight,
        reference=base,
        dtype=dtype,
    )
    return len(linears)
