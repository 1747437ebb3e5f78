"""Students read from the seeds' checkpoints, and written as such.

What a tensor's shape says (bits, ranks) is read from it and not from config.json, which several
checkpoints of one folder share.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qat.grids.scalar import snap_float16
from qat.grids.scales import LowRank
from qat.legacy import checkpoint as keys
from qat.legacy.layer import (
    FLOOR,
    finite_weight,
    first_form_indices,
    frozen_indices,
    layer_parts,
    read_codebook,
    read_factors,
)
from qat.legacy.torch_file import write_torch_file
from qat.model.checkpoint import dense_targets, empty_student, put
from qat.model.layers import FakeQuantWeight
from qat.model.rankwise import as_group_scales
from qat.model.surgery import quantized_layers
from qat.quant.plan import PlanRules, Rule, tensor_kind
from qat.quant.spec import TensorSpec, make_spec
from qat.storage.decode import naming, reading
from qat.storage.files import atomic_file, write_json

KINDS = ("mlp", "attention")


def read_seed_student(
    checkpoint: keys.SeedCheckpoint, base: Path, *, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Return the student that a checkpoint stands for, on the CPU, in eval mode, frozen.

    Args:
        checkpoint: From `open_seed_checkpoint`.
        base: Folder of its full-precision model: its config, and its dense parts where the
            checkpoint has none at all.
        dtype: Of the dense parts.

    Raises:
        ValueError: If a tensor does not fit the model or another tensor; names it.
    """
    file = checkpoint.file
    with naming(file):
        factors = {name: read_factors(checkpoint, name) for name in checkpoint.layers}
        model = empty_student(base, rules_of(checkpoint, factors).resolve, dtype)
        layers = quantized_layers(model)
        odd = {"unknown": factors.keys() - layers, "missing": layers.keys() - factors}
        for what, names in odd.items():
            keys.refuse_keys(file, what, [f"{name}.{keys.SCALE_A}" for name in names])
        for name, layer in layers.items():
            fill_layer(layer, checkpoint, name, factors[name])
        fill_dense(model, checkpoint, base, dtype)
    return model.eval().requires_grad_(False)


def seed_rules(checkpoint: keys.SeedCheckpoint) -> PlanRules:
    """Return how a checkpoint is quantized."""
    with naming(checkpoint.file):
        factors = {name: read_factors(checkpoint, name) for name in checkpoint.layers}
        return rules_of(checkpoint, factors)


def rules_of(checkpoint: keys.SeedCheckpoint, factors: dict[str, LowRank]) -> PlanRules:
    """Return the plan of a checkpoint whose layers of one kind agree in bits and rank."""
    specs: dict[str, TensorSpec] = {}
    firsts: dict[str, str] = {}
    dtypes = stored_dtypes(checkpoint, factors)
    for name, parts in checkpoint.layers.items():
        kind = tensor_kind(name)
        if kind not in KINDS:
            raise ValueError(f"{checkpoint.file} quantizes {name}, which students keep dense")
        spec = make_spec(
            bits_of(name, parts),
            **sizes_of(factors[name]),
            stored_dtype=dtypes[kind],
            floor=FLOOR if checkpoint.is_first_form else None,
        )
        if specs.setdefault(kind, spec) != spec:
            raise ValueError(
                f"{checkpoint.file}: {name} has {spec.bits} bits and scales of rank {spec.rank}, "
                f"{firsts[kind]} {specs[kind].bits} and {specs[kind].rank}; "
                "layers of one kind must agree"
            )
        firsts.setdefault(kind, name)
    lacking = [kind for kind in KINDS if kind not in specs]
    if lacking:
        raise ValueError(f"{checkpoint.file} has no quantized {lacking[0]} layer; both are needed")
    mlp, attention = specs["mlp"], specs["attention"]
    size = f"r{mlp.rank}" if mlp.rank else f"g{mlp.group_size}"
    name = f"q{mlp.bits}a{attention.bits}_{size}"
    return PlanRules(name, tuple(Rule(kind, specs[kind]) for kind in KINDS))


def bits_of(name: str, parts: keys.Parts) -> int:
    """Return the bits per index that a codebook's length stands for."""
    count = parts[keys.CODEBOOK].numel()
    bits = count.bit_length() - 1
    if count != 2**bits or not 2 <= bits <= 8:
        raise ValueError(f"{name}.{keys.CODEBOOK} has {count} values; students hold 4, 8, .. 256")
    return bits


def sizes_of(factors: LowRank) -> dict[str, int]:
    """Return rank, or group size where the factors are group scales."""
    groups = as_group_scales(factors)
    if groups is None:
        return {"rank": len(factors.magnitude)}
    return {"group_size": factors.scale_b.shape[1] // groups.shape[1]}


def stored_dtypes(
    checkpoint: keys.SeedCheckpoint, factors: dict[str, LowRank]
) -> dict[str | None, str]:
    """Return, by kind of layer, the least dtype that holds its scales and codebooks."""
    dtypes: dict[str | None, str] = {}
    for name, parts in checkpoint.layers.items():
        numbers = [*factors[name], read_codebook(parts)]
        fits = all(torch.equal(snap_float16(values), values) for values in numbers)
        kind = tensor_kind(name)
        dtypes[kind] = dtypes.get(kind, "float16") if fits else "float32"
    return dtypes


@torch.no_grad()
def fill_layer(
    layer: FakeQuantWeight, checkpoint: keys.SeedCheckpoint, name: str, factors: LowRank
) -> None:
    """Put a layer's indices, codebook and factors in place."""
    parts = checkpoint.layers[name]
    codebook = read_codebook(parts)
    if layer.spec.rank:
        for part, values in factors._asdict().items():
            put(getattr(layer, part), values, f"{name}.{part}")
    else:
        put(layer.scale, as_group_scales(factors), f"{name}.{keys.SCALE_A}")
    put(layer.codebook, codebook, f"{name}.{keys.CODEBOOK}")
    if checkpoint.is_first_form:
        indices = first_form_indices(parts[keys.LATENT].float(), layer.full_scale(), codebook)
    else:
        indices = frozen_indices(name, parts, layer.full_scale())
    put(layer.indices, indices, f"{name}.{keys.INDICES}")


@torch.no_grad()
def fill_dense(
    model: nn.Module, checkpoint: keys.SeedCheckpoint, base: Path, dtype: torch.dtype
) -> None:
    """Put dense parts in place, from the checkpoint or, where it has none, from the base model."""
    targets = dense_targets(model)
    dense = checkpoint.dense or read_dense(base, list(targets))
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    tied = {head} if head not in targets else set()
    if tied & dense.keys() and not torch.equal(dense[head], dense.get(embedding, dense[head])):
        raise ValueError(
            f"{checkpoint.file}: {head} differs from {embedding}, which the base model's config "
            "ties to it; give the base model that it was trained from"
        )
    derived = {key for key in dense if key.endswith("rotary_emb.inv_freq")}
    keys.refuse_keys(
        checkpoint.file, "unknown", sorted(dense.keys() - targets.keys() - tied - derived)
    )
    keys.refuse_keys(checkpoint.file, "missing", sorted(targets.keys() - dense.keys()))
    for key, target in targets.items():
        put(target, dense[key].to(dtype), key)


def read_dense(folder: Path, keys: list[str]) -> keys.Parts:
    """Return the tensors of a model folder that are asked for and there."""
    found: keys.Parts = {}
    for file in sorted(folder.glob("*.safetensors")):
        with reading(file), safe_open(file, framework="pt") as handle:
            found |= {key: handle.get_tensor(key) for key in keys if key in handle.keys()}  # noqa: SIM118 not a dict
    return found


def latent_weights(checkpoint: keys.SeedCheckpoint) -> Callable[[str], Tensor | None]:
    """Return a function from a layer's name to its latent weight, (O, I); None where unknown."""

    def weight_of(name: str) -> Tensor | None:
        weight = checkpoint.layers.get(name, {}).get(keys.LATENT)
        return None if weight is None else finite_weight(name, weight)

    return weight_of


def write_seed_checkpoint(
    model: nn.Module,
    file: Path,
    *,
    model_id: str,
    weight_of: Callable[[str], Tensor | None] | None = None,
    notes: dict[str, Any] | None = None,
    is_float16: bool = False,
) -> None:
    """Write a student as a V2 checkpoint, `config.json` next to it."""
    write_seed_state(model, file, weight_of=weight_of, is_float16=is_float16)
    notes = {**(notes or {}), "content": keys.content_fingerprint(file)}
    config = {**config_of_student(model, model_id), keys.OUR_KEY: notes}
    write_json(file.parent / keys.CONFIG_NAMES[0], config)


def config_of_student(model: nn.Module, model_id: str) -> dict[str, Any]:
    """Return config.json of a student as V2 checkpoints have it, without notes of ours."""
    layers = quantized_layers(model)
    ranks = common_ranks(layers)
    specs = {tensor_kind(name): layer.spec for name, layer in layers.items()}
    mlp, attention = specs["mlp"], specs["attention"]
    sizes = (2**mlp.bits, ranks["mlp"], 2**attention.bits, ranks["attention"])
    preset = next((name for name, preset in keys.PRESETS.items() if preset == sizes), None)
    return {
        "version": "v2",
        "model_id": model_id,
        **({"config_preset": preset} if preset else {}),
        "lut_bits": mlp.bits,
        "mlp_lut_bits": mlp.bits,
        "attn_lut_bits": attention.bits,
        "scale_rank": ranks["mlp"],
        "mlp_scale_rank": ranks["mlp"],
        "attn_scale_rank": ranks["attention"],
        "group_size": mlp.group_size or keys.DEFAULT_GROUP_SIZE,
        "force_positive_scales": False,
        "magnitude_activation": "identity",
    }


def common_ranks(layers: dict[str, FakeQuantWeight]) -> dict[str | None, int]:
    """Return the largest rank of each kind of layer; group scales count as ranks."""
    ranks: dict[str | None, int] = {}
    for name, layer in layers.items():
        rank = layer.spec.rank or layer.scale.shape[1]
        ranks[tensor_kind(name)] = max(ranks.get(tensor_kind(name), 0), rank)
    return ranks


def write_seed_state(
    model: nn.Module,
    file: Path,
    *,
    weight_of: Callable[[str], Tensor | None] | None = None,
    is_float16: bool = False,
) -> None:
    """Write a student's tensors as a V2 checkpoint has them.

    Group scales are written as low-rank ones, exactly. Ranks of one kind are made equal.

    Args:
        model: A student without floored scales.
        file: Ends in .pt; written over.
        weight_of: Latent weight by layer name; the student's own weight where there is none.
        is_float16: Whether every number is to be a float16 one, as `snap_student` leaves them.

    Raises:
        ValueError: If the student's scales are floored, or a number is not finite, or no float16
            one where it is to be.
    """
    layers = quantized_layers(model)
    for name, layer in layers.items():
        if layer.spec.floor is not None:
            raise ValueError(f"{name} floors its scales; run `qat convert-v1-to-v2` first")
    ranks = common_ranks(layers)

    def parts_of(name: str) -> keys.Parts:
        weight = weight_of and weight_of(name)
        return layer_parts(layers[name], ranks[tensor_kind(name)], weight, is_float16)

    with atomic_file(file) as temporary:
        write_torch_file(temporary, checked(seed_tensors(model, layers, parts_of), is_float16))


def seed_tensors(
    model: nn.Module, layers: dict[str, FakeQuantWeight], parts_of: Callable[[str], keys.Parts]
) -> Iterator[tuple[str, Tensor | str]]:
    """Yield a student's tensors under the seeds' names; for a tied head, the embedding's name."""
    names: dict[int, str] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        owner, _, part = key.rpartition(".")
        if owner not in layers or part == "bias":
            first = names.setdefault(id(tensor), key)
            yield key, tensor.detach().cpu().float() if first == key else first
        elif part == "indices":
            for name, values in parts_of(owner).items():
                yield f"{owner}.{name}", values


def checked(
    tensors: Iterable[tuple[str, Tensor | str]], is_float16: bool
) -> Iterator[tuple[str, Tensor | str]]:
    """Pass tensors on, refused if a number is not finite, or no float16 one where it is to be."""
    for key, values in tensors:
        if isinstance(values, Tensor) and values.is_floating_point():
            if not torch.isfinite(values).all():
                raise ValueError(f"{key} holds NaN or infinity; train with a lower rate")
            if is_float16 and not torch.equal(snap_float16(values), values):
                raise ValueError(f"{key} holds more than float16 does; run `qat snap-fp16`")
        yield key, values
