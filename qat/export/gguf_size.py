"""The bytes of the GGUF file that a plan comes to, known without any weight."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from transformers import PreTrainedConfig

from qat.export.gguf_file import ALIGNMENT
from qat.export.gguf_keys import rope_factors, start_file
from qat.export.gguf_vocabulary import read_vocabulary
from qat.export.to_gguf import (
    FILE_NAME,
    ROPE_FACTORS,
    PlannedTensor,
    file_names,
    main_file_type,
    require_type,
)
from qat.grids.blocks import BLOCK_TYPES
from qat.model.load import load_tokenizer
from qat.quant.plan import QuantPlan
from qat.quant.spec import TensorSpec


def planned_file_bytes(config: PreTrainedConfig, plan: QuantPlan, *, text_source: Path) -> int:
    """Return the bytes of a plan's GGUF file: tensors, keys, tokenizer and padding."""
    names = file_names(config, plan.specs)
    vocabulary = read_vocabulary(load_tokenizer(text_source), config.vocab_size)
    tensors = [
        PlannedTensor(source, names[source], planned_type(source, spec))
        for source, spec in plan.specs.items()
    ]
    shapes = [plan.shapes[tensor.source] for tensor in tensors]
    factors = rope_factors(config)
    with TemporaryDirectory() as folder:
        path = Path(folder) / FILE_NAME
        writer = start_file(path, config, vocabulary, main_file_type(tensors))
        if factors is not None:
            tensors.append(PlannedTensor("", ROPE_FACTORS, "f32"))
            shapes.append(tuple(factors.shape))
        sizes = []
        for tensor, shape in zip(tensors, shapes, strict=True):
            kind = BLOCK_TYPES[tensor.type_name]
            sizes.append(math.prod(shape) // kind.num_weights * kind.num_bytes)
            dtype = np.dtype(np.float32)
            writer.add_tensor_info(tensor.name, shape, dtype, sizes[-1], kind.number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header_bytes = path.stat().st_size
    return sum(padded(size) for size in (header_bytes, *sizes))


def padded(num_bytes: int) -> int:
    """Return a number of bytes rounded up to the file's alignment."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def planned_type(source: str, spec: TensorSpec) -> str:
    """Return the type of a tensor in the file."""
    return require_type(source, spec) if spec.is_quantized else spec.name
