"""Error feedback, descent and scales of blocks against H."""

import pytest
import torch

from qat.quant.fit import fit_weight
from qat.quant.hessian import (
    dampen,
    descend,
    feed_errors,
    feedback_factor,
    fit_with_hessian,
    hessian_error,
    refit_scale,
)
from qat.quant.hessian_blocks import falling_block_order
from qat.quant.spec import FORMATS, SUPER_SCALES
from tests.tiny import others_later

SPEC = FORMATS["gguf:iq2_s"]
SPECS = [FORMATS[f"gguf:{kind}"] for kind in SUPER_SCALES]

each_spec = pytest.mark.parametrize("spec", others_later(SPECS), ids=lambda spec: spec.name)


@pytest.fixture
def case():
    """Return a weight and the second moment of correlated inputs."""
    weight = torch.randn(12, 512) * 0.02
    x = torch.randn(1024, 512) @ torch.randn(512, 512) / 20 * torch.randn(512).mul(0.5).exp()
    return weight, x.T @ x / 1024


def test_order_keeps_blocks_together():
    """A permutation of blocks, the loudest first."""
    hessian = torch.diag(torch.rand(64))
    order = falling_block_order(hessian, 8).view(-1, 8)
    assert torch.equal(order % 8, torch.arange(8).expand(8, 8))
    loudness = hessian.diagonal()[order].sum(1)
    assert torch.equal(loudness, loudness.sort(descending=True).values)


def test_feedback_is_that_of_whole_inverses(case):
    """The errors that later columns get, against the inverse of what is left of H at each block."""
    weight, hessian = case
    weight, hessian = weight[:4, :256], dampen(hessian[:256, :256])
    start = fit_weight(weight, SPEC)
    found = feed_errors(weight, start, hessian)
    order = falling_block_order(hessian, 8)
    work, left = weight[:, order].double(), hessian[order][:, order].double()
    scale = start.full_scale().repeat_interleave(16, dim=1)[:, order]
    values = found.dequantize()[:, order].double()
    for first in range(0, 256, 8):
        inverse = torch.linalg.inv(left)
        metric = torch.linalg.inv(inverse[:8, :8])
        block = slice(first, first + 8)
        normalized = (work[:, block] / scale[:, block]).float()
        nearest = SPEC.grid.nearest(normalized, None, metric.diagonal().float())
        assert torch.equal(nearest * scale[:, block], values[:, block].float())
        work[:, first + 8 :] -= (work[:, block] - values[:, block]) @ metric @ inverse[:8, 8:]
        left = left[8:, 8:]


def test_factor_of_blocks_is_that_of_the_inverse(case):
    """U^T U = H^-1 in the order of blocks."""
    _, hessian = case
    order = falling_block_order(hessian, 8)
    hessian = dampen(hessian)[order][:, order].double()
    factor = feedback_factor(hessian.float()).double()
    assert torch.allclose(factor.T @ factor @ hessian, torch.eye(512).double(), atol=1e-3)


@pytest.mark.recipe
@each_spec
def test_descent_and_scales_never_raise_the_error(case, spec):
    """Each step, on what the steps before it left."""
    weight, hessian = case
    hessian = dampen(hessian)
    quantized = feed_errors(weight, fit_weight(weight, spec), hessian)
    error = hessian_error(weight, quantized, hessian)
    for _ in range(2):
        for step in (refit_scale, descend):
            quantized = step(weight, quantized, hessian)
            lower = hessian_error(weight, quantized, hessian)
            assert lower <= error * (1 + 1e-6)
            error = lower


@pytest.mark.recipe
@each_spec
def test_the_fit_beats_that_by_second_moments(case, spec):
    """A third of tr(E H E^T) at least."""
    weight, hessian = case
    plain = fit_weight(weight, spec, importance=hessian.diagonal())
    full = fit_with_hessian(weight, spec, hessian)
    assert hessian_error(weight, full, hessian) < 0.67 * hessian_error(weight, plain, hessian)


@pytest.mark.recipe
def test_rows_in_chunks_are_rows_together(case, monkeypatch):
    """A vocabulary of any size fits memory, with the same result."""
    weight, hessian = case
    together = fit_with_hessian(weight, SPEC, hessian)
    monkeypatch.setattr("qat.quant.hessian.FITTED_ROWS", 5)
    chunks = fit_with_hessian(weight, SPEC, hessian)
    assert (together.indices == chunks.indices).float().mean() > 0.99
    assert hessian_error(weight, chunks, hessian) == pytest.approx(
        hessian_error(weight, together, hessian), rel=0.01
    )
