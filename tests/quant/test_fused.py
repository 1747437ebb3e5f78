"""The kernels of a GPU, run number by number on the CPU by Triton's interpreter.

It cuts bfloat16 off in place of rounding; on a GPU `test_straight_through` compares that as well.
"""

import pytest
import torch

from qat.grids.scalar import ScalarGrid, fixed_codebook
from qat.quant.straight_through import round_to_grid, weight_gradients

pytestmark = pytest.mark.parity
KINDS = [
    *(("learned", 2), ("int", 4), ("int", 8), ("balanced", 2), ("uint", 4), ("uniform", 3)),
    *(("iq4_nl", 4), ("mxfp4", 4), ("ternary", 2)),
]
SHAPE = (7, 96)


@pytest.fixture(scope="module")
def fused():
    """The module, its kernels interpreted where there is no GPU."""
    pytest.importorskip("triton")
    from qat.quant import fused

    return fused


def parts_of(kind, bits, num_groups):
    """Return weights, scales, offsets and a codebook; some that rounding has to take care of."""
    codebook = torch.randn(4).sort().values if kind == "learned" else fixed_codebook(kind, bits)
    weight = torch.randn(SHAPE)
    weight[2, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    scale = torch.rand(SHAPE[0], num_groups) + 0.05
    scale[0, 0], scale[1, 0] = 0.0, -scale[1, 0]
    offset = torch.randn_like(scale) if kind == "uint" else None
    return weight, scale, offset, codebook


@pytest.mark.parametrize("num_groups", [1, 3, SHAPE[1]])
@pytest.mark.parametrize(("kind", "bits"), KINDS)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_kernels_form_the_weights_of_torch_to_the_bit(fused, kind, bits, num_groups):
    """And the same gradients, whose sums are added in another order."""
    weight, scale, offset, codebook = parts_of(kind, bits, num_groups)
    grid = ScalarGrid(bits, kind)
    assert fused.serves(scale, SHAPE[1])
    for dtype in (torch.float32, torch.float16):
        expected = round_to_grid(weight, scale, offset, codebook, grid, dtype)
        found = fused.form(weight, scale, offset, codebook, grid, dtype)
        assert found.dtype == dtype
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    gradient = torch.randn(SHAPE)
    needed = (True, True, offset is not None)
    expected = weight_gradients(grid, weight, (scale, offset), codebook, gradient, (*needed, False))
    arriving = gradient.clone()
    found = fused.gradients(
        weight, (scale, offset), codebook, grid, arriving, needed, overwrites=True
    )
    assert found[0] is arriving
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[1:], expected[1:3], strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_only_what_is_needed_is_given(fused):
    """Frozen weights or scales get no gradient; groups wider than a tile are not served."""
    weight, scale, _, codebook = parts_of("int", 4, 3)
    grid, gradient = ScalarGrid(4, "int"), torch.randn(SHAPE)
    scales = (scale, None)
    kept = gradient.clone()
    d_latent, d_scale, d_offset = fused.gradients(
        weight, scales, codebook, grid, gradient, (False, True, False)
    )
    assert d_latent is None
    assert d_offset is None
    assert d_scale.shape == scale.shape
    assert torch.equal(gradient, kept)
    assert not fused.serves(torch.ones(1, 1), 2 * fused.WIDEST)
