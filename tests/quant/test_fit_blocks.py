"""The fit of blocks: better than simple ones, and as files hold it."""

import pytest
import torch

from qat.grids.scalar import fits_float16, over_scale, snap_float16
from qat.quant.fit import fit_weight, floored, weighted_error
from qat.quant.spec import FORMATS, SUPER_SCALES, make_spec
from qat.quant.straight_through import fake_quantize
from tests.tiny import others_later

SPEC = FORMATS["gguf:iq2_s"]
SPECS = [FORMATS[f"gguf:{kind}"] for kind in SUPER_SCALES]
# Relative errors on a Gaussian weight, a hundredth above what was measured.
ERRORS = {"iq2_xxs": 0.109, "iq2_xs": 0.083, "iq2_s": 0.059, "iq3_xxs": 0.033, "iq3_s": 0.018}

each_spec = pytest.mark.parametrize("spec", others_later(SPECS), ids=lambda spec: spec.name)


@each_spec
def test_parts_are_as_files_hold_them(spec):
    """Integers in range, float16 numbers, indices that are the nearest ones; training agrees."""
    weight = torch.randn(8, 512) * 0.02
    quantized = fit_weight(weight, spec)
    steps, d = quantized.parts["sub_scale"], quantized.parts["super_scale"]
    assert torch.equal(steps, steps.round())
    assert steps.min() >= 0
    assert steps.max() <= 15
    assert torch.equal(d, snap_float16(d))
    assert fits_float16(d)
    scale = quantized.full_scale()
    assert torch.equal(spec.grid.round(over_scale(weight, scale)), quantized.indices)
    trained = fake_quantize(weight, scale, None, spec.grid)
    assert torch.equal(trained, quantized.dequantize())


@each_spec
@pytest.mark.parametrize("size", [0.002, 1.0])
def test_errors_are_those_of_the_type(spec, size):
    """Also where super-scales are below float16's normal numbers."""
    weight = torch.randn(32, 512) * size
    error = weighted_error(weight, fit_weight(weight, spec), torch.ones(512))
    assert error < ERRORS[spec.grid.kind]


@each_spec
def test_weights_on_the_grid_are_found_again(spec):
    """A weight that the format holds comes back with a fraction of the error of any other."""
    quantized = fit_weight(torch.randn(8, 512), spec)
    again = fit_weight(quantized.dequantize(), spec)
    error = weighted_error(quantized.dequantize(), again, torch.ones(512))
    assert error < 0.15 * ERRORS[spec.grid.kind]


@pytest.mark.recipe
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
