"""One quantized linear between the seeds' tensors and ours.

Second form ("V2"), with unit columns of A, unit rows of B:

    W_hat = lut[_indices] * (A * (rank_magnitude + 1e-6)) @ B
    A = scale_A / max(|column|, 1e-6), B = scale_B / max(|row|, 1e-6)

Where `_scales_baked_flag` is 1, A, B and rank_magnitude are taken as they are. First form ("V1"):

    W_hat = lut[nearest(weight / S)] * S,  S = max(scale_A @ scale_B, 1e-8), first I columns of B

Shape legend: O out, I in, R rank, C codebook values.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from qat.grids.scalar import nearest_indices, snap_float16
from qat.grids.scales import LowRank
from qat.legacy import checkpoint as keys
from qat.model.layers import FakeQuantLinear
from qat.model.rankwise import low_rank_factors, widen
from qat.model.surgery import current_indices

EPSILON = 1e-6  # added to magnitudes, least norm of a direction
FLOOR = 1e-8  # of a scale in the first form
FOLD_TOLERANCE = 2e-6  # float32 norms; a float16 number is 250 times further from the next
UNIFORM_TOLERANCE = 4e-3  # bfloat16 rounding of a codebook value up to one
AXES = {  # of the codebook any: it is flattened
    keys.CODEBOOK_STEPS: 1,
    keys.MAGNITUDE: 1,
    **dict.fromkeys((keys.SCALE_A, keys.SCALE_B, keys.LATENT, keys.VALUES, keys.INDICES), 2),
}
SMALL = (keys.CODEBOOK, keys.CODEBOOK_STEPS, keys.MAGNITUDE, keys.SCALE_A, keys.SCALE_B)
POSITIVE = {"abs": torch.abs, "softplus": nn.functional.softplus}
ACTIVATIONS = {"identity": lambda magnitude: magnitude, **POSITIVE}


def read_factors(checkpoint: keys.SeedCheckpoint, name: str) -> LowRank:
    """Return the factors whose product is a layer's scales, as the seeds' forward makes them."""
    parts, config = checkpoint.layers[name], checkpoint.config
    check_shapes(checkpoint, name)
    scale_a, scale_b = parts[keys.SCALE_A].float(), parts[keys.SCALE_B].float()
    if checkpoint.is_first_form:
        scale_b = scale_b[:, : parts[keys.LATENT].shape[1]].contiguous()  # padded to whole groups
        return LowRank(scale_a, torch.ones(scale_a.shape[1]), scale_b)
    magnitude = parts[keys.MAGNITUDE].float()
    if keys.BAKED in parts and int(parts[keys.BAKED]) == 1:
        return LowRank(scale_a, magnitude, scale_b)
    if config.get("force_positive_scales"):
        positive = choice(config, "positive_scale_method", "abs", POSITIVE)
        scale_a, scale_b = positive(scale_a), positive(scale_b)
    activation = choice(config, "magnitude_activation", "identity", ACTIVATIONS)
    return unit_directions(scale_a, activation(magnitude) + EPSILON, scale_b)


def unit_directions(scale_a: Tensor, magnitude: Tensor, scale_b: Tensor) -> LowRank:
    """Return factors of the product of unit directions and magnitudes.

    Where A and B are float16 numbers and magnitudes over their norms come out as such, these are
    what `seed_factors` wrote: they are given back, exactly.
    """
    norm_a = scale_a.norm(dim=0).clamp_min(EPSILON)
    norm_b = scale_b.norm(dim=1).clamp_min(EPSILON)
    folded = magnitude / (norm_a * norm_b)
    written = LowRank(scale_a, snap_float16(folded), scale_b)
    is_near = ((written.magnitude - folded).abs() <= FOLD_TOLERANCE * folded.abs()).all()
    if is_near and all(torch.equal(snap_float16(factor), factor) for factor in written):
        return written
    return LowRank(scale_a / norm_a, magnitude, scale_b / norm_b.unsqueeze(1))


def choice(config: dict[str, Any], key: str, default: str, known: dict[str, Any]) -> Any:
    """Return what a value of config.json stands for."""
    name = config.get(key, default)
    if name not in known:
        raise ValueError(f"config.json has {key} {name!r}; known are {', '.join(known)}")
    return known[name]


def check_shapes(checkpoint: keys.SeedCheckpoint, name: str) -> None:
    """Refuse a layer whose tensors do not go together or hold NaN or infinity; names the key."""
    parts = checkpoint.layers[name]
    for part, num_axes in AXES.items():
        if part in parts and parts[part].dim() != num_axes:
            raise ValueError(
                f"{name}.{part} has shape {tuple(parts[part].shape)}, not {num_axes} axes; fetch "
                "the checkpoint again"
            )
    for part in SMALL:
        if part in parts and not torch.isfinite(parts[part]).all():
            raise ValueError(f"{name}.{part} holds NaN or infinity; give an earlier checkpoint")
    if keys.BAKED in parts and parts[keys.BAKED].numel() != 1:
        raise ValueError(f"{name}.{keys.BAKED} is no flag; fetch the checkpoint again")
    num_outputs, rank = parts[keys.SCALE_A].shape
    width = parts[keys.SCALE_B].shape[1]
    num_inputs = parts[keys.LATENT].shape[1] if checkpoint.is_first_form else width
    expected = {keys.SCALE_B: (rank, max(width, num_inputs)), keys.MAGNITUDE: (rank,)}
    expected |= dict.fromkeys((keys.LATENT, keys.VALUES, keys.INDICES), (num_outputs, num_inputs))
    for part, shape in expected.items():
        if part in parts and tuple(parts[part].shape) != shape:
            raise ValueError(
                f"{name}.{part} has shape {tuple(parts[part].shape)}, its layer needs {shape}; "
                "fetch the checkpoint again"
            )


def read_codebook(parts: keys.Parts) -> Tensor:
    """Return the codebook that a layer's forward uses, (C,) float32.

    Codebooks in training are kept as steps: 8 shares of the way from 0 to the largest value, each
    no less than two float16 spacings there, mirrored. `lut` then holds what training started from.
    """
    stored = parts[keys.CODEBOOK].float().flatten()
    if keys.CODEBOOK_STEPS not in parts:
        return stored
    largest = float(stored.abs().max())
    least = max(2 * 2.0 ** (math.ceil(math.log2(max(largest, EPSILON))) - 10), 1e-4)
    shares = parts[keys.CODEBOOK_STEPS].float().softmax(0)
    steps = least + (largest - len(shares) * least) * shares
    positive = steps.cumsum(0)
    return snap_float16(torch.cat([-positive.flip(0), positive]))


def frozen_indices(name: str, parts: keys.Parts, scale: Tensor) -> Tensor:
    """Return a layer's indices, (O, I) uint8.

    Their forward reads the values `_Q`, so these decide; else the indices; else what the latent
    weight rounds to, as their training does where a checkpoint has neither.
    """
    codebook, order = parts[keys.CODEBOOK].float().flatten().sort()
    if keys.VALUES in parts and keys.CODEBOOK_STEPS not in parts:
        values = parts[keys.VALUES]
        found = nearest_indices(values.float(), codebook)
        wrong = int((codebook.to(values.dtype)[found.int()] != values).sum())
        if wrong:
            raise ValueError(
                f"{name}.{keys.VALUES} holds {wrong} values that {name}.{keys.CODEBOOK} lacks: one "
                "of the two is of another step of training; bake the codebook where it was trained"
            )
        return order.to(torch.uint8)[found.int()]
    if keys.INDICES in parts:
        indices = parts[keys.INDICES]
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= len(codebook):
            raise ValueError(
                f"{name}.{keys.INDICES} reaches {low} .. {high}, {name}.{keys.CODEBOOK} has "
                f"{len(codebook)} values; fetch the checkpoint again"
            )
        return indices.to(torch.uint8)
    if keys.LATENT not in parts:
        raise ValueError(f"{name}.{keys.INDICES} is missing; give a checkpoint that has it")
    normalized = finite_weight(name, parts[keys.LATENT]) / scale
    return order.to(torch.uint8)[nearest_indices(normalized, codebook).int()]


def finite_weight(name: str, weight: Tensor) -> Tensor:
    """Return a latent weight in float32, refused if a number is not finite."""
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}.{keys.LATENT} holds NaN or infinity; give an earlier checkpoint")
    return weight.float()


def first_form_indices(weight: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    """Return the indices of the first form's forward, (O, I) uint8.

    It rounds on the exact even grid of -1 .. 1, of which `lut` is a float16 copy: the nearest
    value of the copy is another one for some weights.
    """
    normalized = (weight / scale).clamp(-1, 1)
    last = len(codebook) - 1
    even = torch.linspace(-1, 1, last + 1)
    if (codebook - even).abs().max() < UNIFORM_TOLERANCE:
        return ((normalized + 1) / (2 / last)).round().clamp(0, last).to(torch.uint8)
    ordered, order = codebook.sort()
    return order.to(torch.uint8)[nearest_indices(normalized, ordered).int()]


@torch.no_grad()
def layer_parts(
    layer: FakeQuantLinear, rank: int, weight: Tensor | None, is_float16: bool = False
) -> keys.Parts:
    """Return a layer's tensors under the seeds' names.

    Args:
        layer: A quantized layer.
        rank: To write its scales with, at least their own.
        weight: Latent weight, (O, I); the layer's own where not given.
        is_float16: Whether its numbers are float16 ones, with magnitudes of one: they are then
            written as they are (baked), and the latent weight is rounded.
    """
    factors = LowRank(*(layer.stored(f).detach().cpu() for f in low_rank_factors(layer)))
    factors = LowRank(*(factor.float() for factor in factors))
    scale_a, magnitude, scale_b = seed_factors(factors, rank, is_float16)
    moves = layer.latent_weight is not None
    codebook = layer.stored(layer.codebook).detach().cpu().float()
    codebook = codebook.sort().values if moves else codebook
    indices = current_indices(layer).cpu().long()
    if weight is None:
        weight = layer.latent_weight if moves else layer.fake_quantized_weight()
    weight = weight.detach().cpu().float().contiguous()
    return {
        keys.LATENT: snap_float16(weight) if is_float16 else weight,
        keys.CODEBOOK: codebook.clone(),
        keys.SCALE_A: scale_a.contiguous(),
        keys.SCALE_B: scale_b.contiguous(),
        keys.MAGNITUDE: magnitude.contiguous(),
        keys.VALUES: codebook[indices],
        keys.INDICES: indices,
        keys.BAKED: torch.tensor(int(is_float16), dtype=torch.int8),
    }


def seed_factors(factors: LowRank, rank: int, is_baked: bool) -> LowRank:
    """Return factors of a rank as a file holds them.

    What is not baked keeps A and B; magnitudes make up for the reader's normalizing and adding.
    """
    if is_baked:
        missing = rank - len(factors.magnitude)
        return LowRank(
            nn.functional.pad(factors.scale_a, (0, missing)),
            nn.functional.pad(factors.magnitude, (0, missing), value=1.0),
            nn.functional.pad(factors.scale_b, (0, 0, 0, missing)),
        )
    scale_a, magnitude, scale_b = widen(factors, rank)
    norms = scale_a.norm(dim=0).clamp_min(EPSILON) * scale_b.norm(dim=1).clamp_min(EPSILON)
    return LowRank(scale_a, magnitude * norms - EPSILON, scale_b)
