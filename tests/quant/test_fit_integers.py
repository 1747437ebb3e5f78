"""The fit of scalar grids with super-block scales: as files hold it, better than simple ones."""

import pytest
import torch

from qat.grids.scalar import fits_float16, over_scale, snap_float16
from qat.quant.fit import fit_weight, floored, weighted_error
from qat.quant.fit_integers import fit_integers
from qat.quant.hessian import (
    dampen,
    descend,
    feed_errors,
    fit_with_hessian,
    hessian_error,
    refit_scale,
)
from qat.quant.spec import FORMATS, K_FORMATS, TensorSpec
from qat.quant.straight_through import fake_quantize
from tests.tiny import others_later

# Simple formats of as many bits or more.
SIMPLE = {"q2_k": "lut2-g16", "q3_k": "lut3-g32", "q4_k": "gguf:iq4_nl", "q5_k": "affine5-g32"}
SIMPLE |= {"q6_k": "affine6-g32", "iq4_xs": "gguf:q4_0"}


def spec_of(name):
    return FORMATS[f"gguf:{name}"]


@pytest.mark.parametrize("name", others_later(K_FORMATS))
def test_parts_are_as_files_hold_them(name):
    """Integers in range, float16 numbers, indices that are the nearest ones, zeros without NaN."""
    spec, weight = spec_of(name), torch.randn(6, 512) * 0.02
    weight[1], weight[2, :256] = 0, 0
    quantized = fit_weight(weight, spec)
    for part, values in quantized.parts.items():
        if bits := spec.scale.integer_bits.get(part):
            assert torch.equal(values, values.round().clamp(0, 2**bits - 1))
        elif part != "codebook":
            assert torch.equal(values, snap_float16(values))
            assert fits_float16(values)
            assert (values != 0).all()
    scales = quantized.expand()
    indices = spec.grid.round(over_scale(weight, *scales), quantized.codebook)
    assert torch.equal(indices, quantized.indices)
    found = quantized.dequantize()
    assert found[1].abs().max() < 1e-3
    scale, offset = scales
    formed = fake_quantize(weight, scale, quantized.codebook, spec.grid, offset=offset)
    assert torch.equal(formed, found)


@pytest.mark.parametrize("name", others_later(K_FORMATS))
@pytest.mark.parametrize("is_steep", [False, True])
def test_the_fit_beats_simple_formats(name, is_steep):
    """Of as many bits or more, with even importances and steep ones."""
    weight = torch.randn(16, 512) * 0.02
    importance = torch.randn(512).exp().square() if is_steep else torch.ones(512)
    spec, simple = spec_of(name), TensorSpec.from_name(SIMPLE[name])
    mass = floored(importance, weight)
    errors = [
        weighted_error(weight, fit_weight(weight, s, importance=importance), mass)
        for s in (spec, simple)
    ]
    assert spec.size_bits((16, 512)) <= simple.size_bits((16, 512)) + 16 * 2**simple.bits
    assert errors[0] < 1.05 * errors[1]  # whose scales are searched more finely


@pytest.mark.parametrize("name", others_later(K_FORMATS))
def test_weights_on_the_grid_are_nearly_found_again(name):
    """A weight that the format holds comes back with a quarter of the error of another one."""
    weight = torch.randn(8, 512) * 0.02
    quantized = fit_weight(weight, spec_of(name))
    ones = torch.ones(512)
    error = weighted_error(weight, quantized, ones)
    held = quantized.dequantize()
    assert weighted_error(held, fit_weight(held, spec_of(name)), ones) < 0.25 * error


@pytest.mark.parametrize("name", ["q3_k", "q4_k"])
def test_more_starts_never_raise_the_error(name):
    """Of no row: each super-block keeps the best of its starts."""
    weight, ones = torch.randn(8, 512), torch.ones(512)
    errors = [
        (fit_integers(weight, spec_of(name), ones, count).dequantize() - weight).square().sum(1)
        for count in (1, 3)
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()


@pytest.fixture(scope="module")
def correlated():
    """Return a weight and the second moment of correlated inputs."""
    torch.manual_seed(0)
    x = torch.randn(1024, 512) @ torch.randn(512, 512) / 20 * torch.randn(512).mul(0.5).exp()
    return torch.randn(16, 512) * 0.02, x.T @ x / 1024


@pytest.mark.parametrize("name", others_later(K_FORMATS))
def test_steps_against_the_hessian_never_raise_the_error(name, correlated):
    """Super-scales, integers and indices, each on what the steps before it left."""
    weight, hessian = correlated
    hessian = dampen(hessian)
    start = fit_weight(weight, spec_of(name), num_rounds=1)
    quantized = feed_errors(weight, start, hessian)
    error = hessian_error(weight, quantized, hessian)
    for step in (refit_scale, descend, refit_scale):
        quantized = step(weight, quantized, hessian)
        lower = hessian_error(weight, quantized, hessian)
        assert lower <= error * (1 + 1e-6)
        error = lower
    for part, bits in spec_of(name).scale.integer_bits.items():
        values = quantized.parts[part]
        assert torch.equal(values, values.round().clamp(0, 2**bits - 1))


@pytest.mark.recipe
@pytest.mark.parametrize("name", others_later(K_FORMATS))
def test_the_hessian_halves_the_error(name, correlated):
    """Nearly: below 0.6 of tr(E H E^T) of the fit by second moments."""
    weight, hessian = correlated
    plain = fit_weight(weight, spec_of(name), importance=hessian.diagonal())
    full = fit_with_hessian(weight, spec_of(name), hessian)
    assert hessian_error(weight, full, hessian) < 0.6 * hessian_error(weight, plain, hessian)
