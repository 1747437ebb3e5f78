"""A student as a folder that mlx-lm loads: affine quantization.

    X.weight (O, I * bits / 32) uint32   index, first in the lowest bits
    X.scales, X.biases (O, G)            weight = index * scale + bias

Affine grids have a trained bias; that of integer grids is -2**(bits-1) * scale.

MLX multiplies and adds in the dtype of the scales: float16 where no step of that rounds for any
scale of the layer, else float32.

Shape legend: O out, I in, G groups of a row.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from qat.export import model_folder
from qat.model.layers import FakeQuantWeight
from qat.model.surgery import current_indices

WEIGHT, SCALES, BIASES = "weight", "scales", "biases"
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


def export_to_mlx(
    student: nn.Module, output: Path, *, text_source: Path, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Write a student as MLX safetensors with its `quantization` block."""
    layers = model_folder.require_students(student)
    for name, layer in layers.items():
        model_folder.require_integer_grid(
            name, layer, kinds=("int", "uint"), bits=BITS, group_sizes=GROUP_SIZES
        )
    block = quantization_block(layers)
    return model_folder.write_folder(
        student,
        output,
        text_source=text_source,
        dtype=dtype,
        config_changes={
            "quantization": block,
            "quantization_config": block,
            **positions(student.config),
        },
        write=affine_parts,
        read=read_weight,
        made_for="mlx",
    )


def positions(config: PreTrainedConfig) -> dict[str, Any]:
    """Return how positions turn heads under mlx-lm's keys: it takes 10000 where they are absent."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if "rope_theta" not in rope:
        return {}
    theta = rope.pop("rope_theta")
    scaling = None if rope.get("rope_type", "default") == "default" else rope
    return {"rope_theta": theta, "rope_scaling": scaling}


def quantization_block(layers: dict[str, FakeQuantWeight]) -> dict[str, Any]:
    """Return bits and group size: of most layers at the top, of the others by name."""
    grids = model_folder.layers_by_grid(layers)
    (bits, group_size), *others = grids
    block: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    for other in others:
        for name in grids[other]:
            block[name] = {"group_size": other[1], "bits": other[0], "mode": "affine"}
    return block


@torch.no_grad()
def affine_parts(layer: FakeQuantWeight) -> dict[str, Tensor]:
    """Return a layer's entries by the last part of their names."""
    bits, (scale, bias) = layer.spec.bits, layer.expand()
    if bias is None:
        bias = -(2 ** (bits - 1)) * scale
    dtype = torch.float16 if is_exact_in_float16(scale, bias, bits) else torch.float32
    return {
        WEIGHT: model_folder.pack_words(current_indices(layer), bits).view(torch.uint32),
        SCALES: scale.to(dtype),
        BIASES: bias.to(dtype),
    }


def is_exact_in_float16(scale: Tensor, bias: Tensor, bits: int) -> bool:
    """Return whether index * scale + bias, (O, G) each, rounds at no step for any index."""
    steps = [index * scale for index in range(2**bits)] + [bias]
    steps += [step + bias for step in steps[:-1]]
    return all(torch.equal(step.half().float(), step) for step in steps)


def read_weight(layer: FakeQuantWeight, parts: dict[str, Tensor]) -> Tensor:
    """Return the weight, (O, I) float32, computed in the entries' own dtype."""
    shape = (layer.out_features, layer.in_features)
    scale, bias = parts[SCALES].unsqueeze(-1), parts[BIASES].unsqueeze(-1)
    indices = model_folder.unpack_words(parts[WEIGHT], layer.spec.bits, shape).view(
        *parts[SCALES].shape, -1
    )
    return (indices.to(scale.dtype) * scale + bias).view(shape).float()


def load_runtime(path: Path) -> Any:
    """Return mlx-lm on a folder: a function from token ids to logits, (T, V) float32."""
    import mlx.core as mx
    import mlx_lm
    import numpy as np

    model, _tokenizer = mlx_lm.load(str(path), tokenizer_config={"trust_remote_code": False})

    def logits(token_ids: list[int]) -> Any:
        return np.array(model(mx.array([token_ids]))[0].astype(mx.float32))

    return logits
