"""Blocks of GGUF's vector types, as the `gguf` package reads them."""

import numpy as np
import pytest
import torch

from qat.grids.blocks import BLOCK_TYPES, pack_super_blocks, unpack_blocks
from qat.grids.iq_blocks import IQ_PACKERS
from qat.grids.scalar import snap_float16
from qat.quant.quantized_tensor import QuantizedTensor
from qat.quant.spec import FORMATS

gguf = pytest.importorskip("gguf")

NUM_BYTES = {"iq2_xxs": 66, "iq2_xs": 74, "iq2_s": 82, "iq3_xxs": 98, "iq3_s": 110}


def random_tensor(name, rows=8, inputs=512):
    """Return every part at random: all points, signs and integers."""
    spec = FORMATS[f"gguf:{name}"]
    shapes = spec.part_shapes((rows, inputs))
    parts = {
        "super_scale": snap_float16(torch.rand(shapes["super_scale"]) + 1e-4),
        "sub_scale": torch.randint(16, shapes["sub_scale"]).float(),
    }
    shape = spec.grid.index_shape((rows, inputs))
    indices = torch.randint(2**spec.grid.index_bits, shape, dtype=torch.int32)
    return QuantizedTensor(spec, indices, parts)


@pytest.mark.parametrize("name", IQ_PACKERS)
def test_blocks_are_those_of_the_gguf_package(name):
    """Dequantized by the package to the bit; as many bytes as the format says."""
    quantized = random_tensor(name)
    packed = pack_super_blocks(quantized.indices, quantized.parts, name)
    assert packed.shape == (8, 2 * NUM_BYTES[name])
    assert packed.numel() == quantized.spec.size_bytes((8, 512))
    number = gguf.GGMLQuantizationType(BLOCK_TYPES[name].number)
    assert number.name == name.upper()
    found = gguf.quants.dequantize(packed.numpy(), number)
    assert np.array_equal(found, quantized.dequantize().numpy())
    assert torch.equal(unpack_blocks(packed, name), quantized.dequantize())


@pytest.mark.parametrize("name", IQ_PACKERS)
def test_the_type_of_a_whole_file_is_of_that_name(name):
    """As llama.cpp counts them."""
    assert gguf.LlamaFileType(BLOCK_TYPES[name].file_type).name == f"MOSTLY_{name.upper()}"
