"""A student as a Hugging Face folder of packed indices, for `import qat.export.plugin`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.export.checks import require_float16
from qat.export.model_folder import (
    dense_parts,
    lossless_dtype,
    require_students,
    write_folder,
)
from qat.model.layers import FakeQuantWeight
from qat.model.surgery import current_indices, stored_parts


def export_to_hf_quantized(
    student: nn.Module,
    output: Path,
    *,
    text_source: Path,
    plan: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Write a student of any plan as packed indices, scales and codebooks.

    Args:
        student: On the CPU, in float32.
        output: A folder that does not exist.
        text_source: Folder of the tokenizer, template and generation files.
        plan: The format of every tensor, as `QuantPlan.to_dict` has it.
        dtype: Of dense parts; the smallest that loses nothing when not given.

    Returns:
        As `write_folder`.

    Raises:
        ValueError: If a scale does not fit or a tensor reads back otherwise.
    """
    from qat.export.plugin import BASE_TYPE_KEY, METHOD, MODEL_TYPE

    layers = require_students(student)
    for name, layer in layers.items():
        if layer.spec.stored_dtype != "float32" and not layer.spec.rank:
            require_float16(name, layer)
    changes = {
        "model_type": MODEL_TYPE,
        BASE_TYPE_KEY: student.config.model_type,
        "quantization_config": {"quant_method": METHOD, "plan": plan},
    }
    return write_folder(
        student,
        output,
        text_source=text_source,
        dtype=dtype or lossless_dtype(list(dense_parts(student).values())),
        config_changes=changes,
        write=lambda _name, layer: packed_parts(layer),
        read=lambda _name, layer, parts: read_weight(layer, parts),
    )


@torch.no_grad()
def packed_parts(layer: FakeQuantWeight) -> dict[str, Tensor]:
    """Return a layer's entries by the last part of their names."""
    from qat.export.plugin import stored_bits

    parts = {n: stored_bits(layer.spec, n, t) for n, t in stored_parts(layer).items()}
    return {"indices": layer.spec.grid.pack(current_indices(layer)), **parts}


def read_weight(layer: FakeQuantWeight, parts: dict[str, Tensor]) -> Tensor:
    """Return the weight, (O, I) float32, as the plugin's layer forms it from a file's entries."""
    from qat.export.plugin import PackedWeight

    packed = PackedWeight(layer.out_features, layer.in_features, layer.spec)
    packed.load_state_dict({name: t for name, t in parts.items() if name != "bias"})
    return packed.weight_on_grid()
