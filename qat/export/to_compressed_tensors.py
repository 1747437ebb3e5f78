"""A student as a compressed-tensors checkpoint (pack-quantized), which transformers and vLLM read.

    weight_packed (O, I * bits / 32) int32   index = code + 2**(bits-1), first in the lowest bits
    weight_scale  (O, G)                     weight = code * scale
    weight_shape  (2,) int64                 O, I

Shape legend: O out, I in, G groups of a row.
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.export import model_folder
from qat.model.layers import FakeQuantLinear, FakeQuantWeight
from qat.model.surgery import current_indices

PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
BITS = (2, 4, 8)


def export_to_compressed_tensors(
    student: nn.Module, output: Path, *, text_source: Path, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Write a student as a folder that compressed-tensors decompresses.

    Loaders cast scales to the folder's dtype, so it is one that holds every scale.
    """
    layers = model_folder.require_students(student)
    for name, layer in layers.items():
        model_folder.require_integer_grid(name, layer, bits=BITS, group_sizes=())
        if not isinstance(layer, FakeQuantLinear):
            raise ValueError(
                f"{name} is a quantized embedding, which loaders of this format keep dense; "
                "convert it (`qat convert --plan 'deploy'`) or export --to gguf"
            )
    dense = [name for name, one in student.named_modules() if isinstance(one, nn.Linear)]
    scales = [layer.full_scale().detach() for layer in layers.values()]
    dtype = dtype or model_folder.lossless_dtype(
        [*scales, *model_folder.dense_parts(student).values()]
    )
    if not all(model_folder.holds(dtype, scale) for scale in scales):
        needed = model_folder.lossless_dtype(scales)
        raise ValueError(
            f"{dtype} rounds the scales, which need {needed}: leave --dtype out, or train on "
            "w2a16-g64+w4a16-g32, whose scales both 16-bit dtypes hold"
        )
    return model_folder.write_folder(
        student,
        output,
        text_source=text_source,
        dtype=dtype,
        config_changes={"quantization_config": quantization_config(layers, dense)},
        write=partial(packed_parts, dtype=dtype),
        read=read_weight,
    )


def distinct_ends(names: list[str], others: list[str]) -> list[str]:
    """Return ends of names as patterns that match all of them and none of the others.

    The last part alone where it tells them apart, else the part from the layer's number on.
    """
    elsewhere = {name.rpartition(".")[2] for name in others}
    ends = set()
    for name in names:
        last = name.rpartition(".")[2]
        ends.add(last if last not in elsewhere else re.sub(r"^.*?(?=\d+\.)", "", name))
    return [end.replace(".", r"\.") for end in sorted(ends)]


def quantization_config(
    layers: dict[str, FakeQuantWeight], dense: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the block of config.json that says how each linear is packed, and which is not."""
    groups, integers = {}, {"type": "int", "symmetric": True, "strategy": "group"}
    grids = model_folder.layers_by_grid(layers)
    for index, ((bits, group_size), names) in enumerate(grids.items()):
        others = [name for grid in grids.values() if grid is not names for name in grid]
        others += dense
        groups[f"group_{index}"] = {
            "targets": [rf"re:.*\.({'|'.join(distinct_ends(names, others))})$"],
            "weights": {"num_bits": bits, "group_size": group_size, **integers},
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(dict.fromkeys(["lm_head", *dense])),
        "config_groups": groups,
    }


@torch.no_grad()
def packed_parts(layer: FakeQuantWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a layer's entries by the last part of their names."""
    return {
        PACKED: model_folder.pack_words(current_indices(layer), layer.spec.bits),
        SCALE: layer.full_scale().to(dtype),
        SHAPE: torch.tensor([layer.out_features, layer.in_features], dtype=torch.int64),
    }


def read_weight(layer: FakeQuantWeight, parts: dict[str, Tensor]) -> Tensor:
    """Return the weight, (O, I) float32, that entries stand for."""
    shape = tuple(parts[SHAPE].tolist())
    codes = model_folder.unpack_words(parts[PACKED], layer.spec.bits, shape).float()
    codes -= 2 ** (layer.spec.bits - 1)
    scale = parts[SCALE].float()
    return (codes.view(*scale.shape, -1) * scale.unsqueeze(-1)).view(shape)
