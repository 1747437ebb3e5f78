"""A 4-bit student to a 2-bit one: MLP layers fitted anew, attention layers kept to the bit.

Attention is fitted anew as well only where it is to have another codebook size, or scales of
another form than it can be widened to.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qat.model.layers import FakeQuantLinear
from qat.model.rankwise import low_rank_factors, widen
from qat.model.surgery import hold_weights, layers_of_kind, quantized_layers, swap
from qat.pipelines.fit_layers import fit_by_blocks
from qat.pipelines.quantize_config import SEED_ATTENTION_RANK, ConvertQ4ToQ2Config, bits_of_size
from qat.quant.fit import check_weight, fit_weight
from qat.quant.scheme import LayerScheme, Scheme, int_layer, layer_kind

WeightOf = Callable[[str], Tensor]


def q2_scheme(scheme: Scheme, config: ConvertQ4ToQ2Config) -> Scheme:
    """Return the scheme after the conversion: the MLP's new one, attention as asked.

    Raises:
        ValueError: If attention stays as it is and the output's form cannot hold that.
    """
    bits, rank, codebook = config.mlp_bits, config.mlp_rank, config.q2_mlp_codebook
    layer = int_layer(bits) if codebook == "int" else LayerScheme(bits=bits, codebook=codebook)
    group_size = config.q2_mlp_group_size or layer.group_size
    attention = attention_scheme(scheme.attention, config)
    if config.is_seed_form and attention.scale_floor is not None:
        raise ValueError(
            f"--output {config.output} cannot hold {config.q4_checkpoint}'s floored scales; "
            "run `qat convert-v1-to-v2` on it first, or name a folder"
        )
    size = f"r{rank}" if rank else f"g{group_size}"
    kind = "" if codebook == "learned" else f"_{codebook}"
    return Scheme(
        name=f"q{bits}a{attention.bits}{kind}_{size}",
        mlp=replace(layer, group_size=group_size, rank=rank),
        attention=attention,
    )


def attention_scheme(former: LayerScheme, config: ConvertQ4ToQ2Config) -> LayerScheme:
    """Return the scheme of attention layers after the conversion."""
    size, rank = config.q2_attn_lut_size, config.q2_attn_rank
    bits = former.bits if size is None else bits_of_size("--q2-attn-lut-size", size)
    if rank is None:
        least = SEED_ATTENTION_RANK if config.is_seed_form and former.rank else 0
        rank = max(former.rank, least)
    if bits == former.bits and (rank == former.rank or can_widen(former, rank)):
        return replace(former, rank=rank)
    return LayerScheme(bits=bits, group_size=former.group_size, rank=rank)


def can_widen(scheme: LayerScheme, rank: int) -> bool:
    """Return whether scales of a scheme can have a larger rank and stay what they are."""
    return 0 < scheme.rank < rank


def layers_to_fit(student: nn.Module, former: Scheme, wanted: Scheme) -> dict[str, LayerScheme]:
    """Return the wanted scheme of each layer that is fitted anew, by name, in the model's order."""
    rank = wanted.attention.rank
    is_kept = replace(former.attention, rank=rank) == wanted.attention and (
        rank == former.attention.rank or can_widen(former.attention, rank)
    )
    kinds = ("mlp",) if is_kept else ("mlp", "attention")
    return {
        name: wanted.layer(name) for name in quantized_layers(student) if layer_kind(name) in kinds
    }


@torch.no_grad()
def widen_attention(student: nn.Module, scheme: LayerScheme) -> None:
    """Give attention layers of a smaller rank the scheme's, in place; no weight changes."""
    for name, layer in layers_of_kind(student, "attention").items():
        if can_widen(layer.scheme, scheme.rank):
            wider = FakeQuantLinear(
                layer.in_features, layer.out_features, replace(layer.scheme, rank=scheme.rank)
            )
            for part, factor in widen(low_rank_factors(layer), scheme.rank)._asdict().items():
                getattr(wider, part).data = factor
            wider.codebook.data, wider.indices = layer.codebook.data, layer.indices
            wider.bias = layer.bias
            swap(student, name, wider.requires_grad_(False))


def weights_to_fit(student: nn.Module, weight_of: Callable[[str], Tensor | None]) -> WeightOf:
    """Return a function from a layer's name to the weight to fit: the given one, else its own."""
    layers = quantized_layers(student)

    def weight(name: str) -> Tensor:
        given = weight_of(name)
        return layers[name].fake_quantized_weight().detach() if given is None else given

    return weight


def check_weights(schemes: dict[str, LayerScheme], weight_of: WeightOf) -> None:
    """Refuse weights that their scheme cannot hold, naming the layer, before any long work."""
    for name, scheme in schemes.items():
        try:
            check_weight(weight_of(name), scheme)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def matching_layers(
    model: nn.Module, student: nn.Module, names: Iterable[str]
) -> dict[str, nn.Module]:
    """Return a model's layer for each of a student's layers, by name.

    Raises:
        ValueError: If the model has no such layer or one of another size; names it.
    """
    found, layers = dict(model.named_modules()), quantized_layers(student)
    for name in names:
        wanted = (layers[name].out_features, layers[name].in_features)
        module = found.get(name)
        sizes = module and (module.out_features, module.in_features)
        if sizes != wanted:
            raise ValueError(
                f"{name} has shape {wanted} in the student and {sizes or 'no match'} in the "
                "full-precision model; give the model it was made from with --model-id"
            )
    return {name: found[name] for name in names}


@torch.no_grad()
def convert_layers(
    student: nn.Module,
    schemes: dict[str, LayerScheme],
    *,
    weight_of: WeightOf,
    importance: dict[str, Tensor] | None = None,
) -> None:
    """Fit layers of a student to other schemes, in place.

    Args:
        student: A student with frozen indices.
        schemes: Of each layer from now on, by name.
        weight_of: Returns the weight to fit, (O, I), for a layer's name.
        importance: Second moments of each layer's inputs by name, (I,).
    """
    layers = quantized_layers(student)
    for name, scheme in tqdm(schemes.items(), desc="convert", unit="layer"):
        try:
            quantized = fit_weight(
                weight_of(name), scheme, importance=importance and importance.get(name)
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        swap(student, name, FakeQuantLinear.from_linear(layers[name], quantized, scheme))


@torch.no_grad()
def convert_layers_by_blocks(
    student: nn.Module,
    reference: nn.Module | None,
    schemes: dict[str, LayerScheme],
    batches: Sequence[Tensor],
    *,
    weight_of: WeightOf,
    token_weights: dict[str, list[Tensor]] | None = None,
    dtype: torch.dtype,
) -> None:
    """Fit layers of a student to other schemes, in place, each fed by those before it.

    Args:
        student: A student with frozen indices.
        reference: The full-precision model, whose outputs are wanted; the student as it comes when
            None.
        schemes: Of each layer from now on, by name.
        batches: Token ids, (B, T) each, on the device of both models.
        weight_of: Returns the weight to fit, (O, I), for a layer's name.
        token_weights: How much each token counts for each layer, as `walk_blocks` takes it.
        dtype: Compute dtype.
    """
    if reference is not None:
        matching_layers(reference, student, schemes)
    hold_weights(student, dtype)
    fit_by_blocks(
        student,
        schemes,
        batches,
        weight_of=weight_of,
        reference=reference,
        token_weights=token_weights,
        dtype=dtype,
    )
