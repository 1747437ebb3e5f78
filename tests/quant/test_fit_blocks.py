"""The fit of blocks: better than simple ones, and as files hold it."""

import torch

from qat.grids.scalar import fits_float16, snap_float16
from qat.quant.fit import fit_weight, floored, weighted_error
from qat.quant.spec import FORMATS, make_spec

SPEC = FORMATS["gguf:iq2_s"]


def test_parts_are_as_files_hold_them():
    """Integers in range, float16 numbers, indices that are the nearest ones."""
    weight = torch.randn(8, 512) * 0.02
    quantized = fit_weight(weight, SPEC)
    steps, d = quantized.parts["sub_scale"], quantized.parts["super_scale"]
    assert torch.equal(steps, steps.round())
    assert steps.min() >= 0
    assert steps.max() <= 15
    assert torch.equal(d, snap_float16(d))
    assert fits_float16(d)
    scale = quantized.full_scale().repeat_interleave(16, dim=1)
    assert torch.equal(SPEC.grid.round(weight / scale), quantized.indices)


def test_a_file_has_the_bytes_of_its_type():
    """82 bytes for 256 weights."""
    assert SPEC.size_bytes((3, 512)) == 3 * 2 * 82


def test_weights_on_the_grid_are_found_again():
    """A weight that the format holds comes back with no more than a hundredth of its power."""
    quantized = fit_weight(torch.randn(8, 512), SPEC)
    again = fit_weight(quantized.dequantize(), SPEC)
    assert weighted_error(quantized.dequantize(), again, torch.ones(512)) < 0.01


def test_blocks_beat_scalars_of_as_many_bits():
    """Even and uneven importances; 2.56 bits against 2.5."""
    weight = torch.randn(32, 512) * 0.02
    for importance in (torch.ones(512), torch.randn(512).exp().square()):
        mass = floored(importance, weight)
        error = weighted_error(weight, fit_weight(weight, SPEC, importance=importance), mass)
        scalar = fit_weight(weight, make_spec(2), importance=importance)
        assert error < 0.75 * weighted_error(weight, scalar, mass)


def test_importance_moves_error_to_where_it_counts_less():
    """Inputs of a large second moment are held more closely."""
    weight, importance = torch.randn(32, 512), torch.ones(512)
    importance[::8] = 100.0
    error = (fit_weight(weight, SPEC, importance=importance).dequantize() - weight).square().mean(0)
    assert error[::8].mean() < 0.3 * error[1::8].mean()


def test_zeros_are_held():
    """A row of zeros gets scales that round to nearly nothing, and no NaN."""
    weight = torch.randn(4, 256)
    weight[1] = 0
    found = fit_weight(weight, SPEC).dequantize()
    assert torch.isfinite(found).all()
    assert found[1].abs().max() < 1e-3
