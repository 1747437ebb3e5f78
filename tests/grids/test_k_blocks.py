"""Blocks of K-types and IQ4_XS: the bytes that ggml defines."""

import numpy as np
import pytest
import torch

from qat.grids.blocks import BLOCK_TYPES, unpack_blocks
from qat.grids.k_blocks import K_FIELDS, pack_k_blocks, spread
from qat.grids.scalar import snap_float16
from qat.quant.quantized_tensor import QuantizedTensor
from qat.quant.spec import FORMATS

gguf = pytest.importorskip("gguf")


def random_tensor(name, rows=8, inputs=512):
    """Return indices and integers of all values, super-scales also below float16's normal range."""
    spec = FORMATS[f"gguf:{name}"]
    parts = {"codebook": spec.grid.start_codebook()}
    for part, shape in spec.scale.part_shapes((rows, inputs)).items():
        if bits := spec.scale.integer_bits.get(part):
            parts[part] = torch.randint(2**bits, shape).float()
        else:
            parts[part] = snap_float16(torch.randn(shape) * 10.0 ** -torch.randint(1, 6, shape))
    indices = torch.randint(2**spec.bits, (rows, inputs), dtype=torch.uint8)
    return QuantizedTensor(spec, indices, parts)


@pytest.mark.parametrize("name", K_FIELDS)
def test_the_gguf_package_reads_the_weights(name):
    """To the bit, from as many bytes as the type has."""
    quantized = random_tensor(name)
    packed = pack_k_blocks(quantized.indices, quantized.parts, name)
    kind = BLOCK_TYPES[name]
    assert packed.shape == (8, 2 * kind.num_bytes)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.number)] == (256, kind.num_bytes)
    found = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType(kind.number))
    assert np.array_equal(found, quantized.dequantize().numpy())
    assert torch.equal(unpack_blocks(packed, name), quantized.dequantize())


@pytest.mark.parametrize("name", K_FIELDS)
def test_only_adding_the_offset_rounds(name):
    """One rounding of the exact weight: no order of products and no fused addition changes it."""
    quantized = random_tensor(name)
    exact = {part: values.double() for part, values in quantized.parts.items()}
    weight = quantized.replaced(**exact).dequantize()
    assert weight.dtype == torch.float64
    assert torch.equal(weight.float(), quantized.dequantize())
    if not quantized.spec.has_offset:
        assert torch.equal(weight, quantized.dequantize().double())


@pytest.mark.parametrize(("bits", "stride"), [(4, 64), (2, 32), (1, 32), (4, 1), (2, 4)])
def test_spread_integers_come_back(bits, stride):
    """Byte j of a run holds integers j, j + stride, ..., the first lowest."""
    values = torch.randint(2**bits, (3, 2, 8 // bits * stride * 2), dtype=torch.uint8)
    packed = spread(values, bits, stride).view(3, 2, 2, stride)
    for place in range(8 // bits):
        found = (packed >> (bits * place)) & (2**bits - 1)
        assert torch.equal(found, values.view(3, 2, 2, -1, stride)[..., place, :])
