"""Curves of gains over scales, and the super-scales and integers found on them."""

import pytest
import torch

from qat.grids.scalar import over_scale, snap_float16
from qat.quant.scale_curves import sample_curves, search_parts, sub_block_gains
from qat.quant.spec import FORMATS

SPEC = FORMATS["gguf:iq3_s"]


@pytest.fixture
def case():
    """Return a weight and uneven importances."""
    return torch.randn(4, 512) * 0.02, torch.rand(512) + 0.1


def error_of(weight, scale, importance):
    """Return the error of each row when points suit given scales, (O,)."""
    values = SPEC.grid.nearest(over_scale(weight, scale), None, importance)
    found = values * scale.repeat_interleave(SPEC.scale.sub_block, dim=1)
    return ((found - weight).square() * importance).sum(1)


def test_gains_are_what_scales_take_off_the_power(case):
    """Their sum is the power of a row less its error."""
    weight, importance = case
    scale = torch.rand(4, 16) * 0.005 + 0.001
    gains = sub_block_gains(weight, scale, SPEC, importance).sum(1)
    power = (weight.square() * importance).sum(1)
    assert torch.allclose(power - gains, error_of(weight, scale, importance), rtol=1e-3)


def test_curves_pass_through_samples_and_near_what_lies_between(case):
    """At samples exactly; elsewhere by a hundredth of the power; below and above them falling."""
    weight, importance = case
    curves = sample_curves(weight, SPEC, importance)
    count = curves.gains.shape[-1]
    power = (weight.square() * importance).view(4, 16, -1).sum(-1, keepdim=True)
    places = torch.arange(count) * curves.step + curves.first.unsqueeze(-1)
    assert torch.allclose(curves.at(places), curves.gains, atol=1e-3 * float(power.max()))
    between = curves.first + curves.step * 15.4
    exact = sub_block_gains(weight, between.exp(), SPEC, importance)
    found = curves.at(between.unsqueeze(-1)).squeeze(-1)
    assert ((found - exact).abs() < 0.01 * power.squeeze(-1)).all()
    ends = torch.tensor([-2.0, -1.0, 0.0, count - 1, count, count + 1]) * curves.step
    found = curves.at(curves.first.unsqueeze(-1) + ends)
    assert (found[..., :3].diff() > 0).all()
    assert (found[..., 3:].diff() < 0).all()


@pytest.mark.recipe
def test_parts_are_nearly_the_best_of_all(case):
    """Against every integer under many super-scales: 3% more error at most."""
    weight, importance = case
    form = SPEC.scale
    parts = search_parts(weight, SPEC, importance)
    found = error_of(weight, form.expand(parts, lambda t: t)[0], importance)
    best = torch.full((4, 2), -torch.inf)
    for factor in torch.linspace(0.7, 1.4, 40):
        trial = {"super_scale": snap_float16(parts["super_scale"] * factor)}
        gains = [
            sub_block_gains(
                weight,
                form.expand({**trial, "sub_scale": torch.full((4, 16), float(step))}, lambda t: t)[
                    0
                ],
                SPEC,
                importance,
            )
            for step in range(16)
        ]
        best = torch.maximum(best, torch.stack(gains).amax(0).view(4, 2, -1).sum(-1))
    least = (weight.square() * importance).sum() - best.sum()
    assert found.sum() < 1.03 * least
