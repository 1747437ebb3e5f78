import pytest
import torch

from qat.quant.fit import fit_weight
from qat.quant.spec import TensorSpec

SHAPE = (6, 64)


def fitted(name):
    """Return a random weight on the grid of a format."""
    generator = torch.Generator().manual_seed(0)
    return fit_weight(torch.randn(SHAPE, generator=generator), TensorSpec.from_name(name))


@pytest.mark.parametrize("name", ["lut2-g32", "int4-g32", "affine4-g64", "lut2-r2"])
def test_the_weight_is_scale_times_value_plus_offset(name):
    """Weight by weight, as the definition says."""
    quantized = fitted(name)
    scale, offset = quantized.expand()
    found = quantized.dequantize()
    size = SHAPE[1] // scale.shape[1]
    for row, column in [(0, 0), (3, 31), (5, 63)]:
        value = quantized.codebook[int(quantized.indices[row, column])]
        expected = scale[row, column // size] * value
        expected = expected if offset is None else expected + offset[row, column // size]
        assert found[row, column] == expected
    assert (quantized.low_rank is not None) == (name == "lut2-r2")


def test_a_replaced_part_leaves_the_others():
    """Another tensor, the same object in all other places."""
    quantized = fitted("lut2-g32")
    doubled = quantized.replaced(scale=2 * quantized.scale)
    assert torch.equal(doubled.dequantize(), 2 * quantized.dequantize())
    assert doubled.indices is quantized.indices
    assert doubled.codebook is quantized.codebook
    zeros = quantized.replaced(indices=torch.zeros_like(quantized.indices))
    assert zeros.scale is quantized.scale
    assert not zeros.indices.any()


def test_runs_of_rows_are_tensors_of_their_own():
    """Each gives its rows of the weight, with a codebook that it shares with none."""
    whole = fitted("int4-g32")
    first, second = whole.split([2, 4])
    assert torch.equal(torch.cat([first.dequantize(), second.dequantize()]), whole.dequantize())
    assert first.indices.untyped_storage().data_ptr() != whole.indices.untyped_storage().data_ptr()
