"""A student as a Hugging Face folder of packed indices, for `import qat.export.plugin`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.export.checks import require_float16
from qat.export.model_folder import require_students, write_folder
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
    """Write a student as packed indices, scales and codebooks; any `QuantPlan.to_dict` will do."""
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
        dtype=dtype,
        config_changes=changes,
        write=packed_parts,
        read=read_weight,
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
