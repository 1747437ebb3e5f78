"""Predicted costs of formats against the sums that they stand for."""

import pytest
import torch

from qat.quant.hessian import fit_with_hessian
from qat.quant.sensitivity import NUM_SWEEPS, WeightInfo, format_costs, sampled_rows
from qat.quant.spec import TensorSpec

NAMES = ("gguf:q2_0", "lut3-g32", "gguf:q4_0", "gguf:q8_0", "f16")


def example(num_rows, num_inputs=64):
    """Return a weight, row masses and an H."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, num_inputs, generator=generator) * torch.linspace(0.2, 2, num_inputs)
    weight = torch.randn(num_rows, num_inputs, generator=generator)
    mass = torch.rand(num_rows, generator=generator) + 0.1
    return weight, mass, x.T @ x / 256


def test_cost_of_few_rows_is_the_sum_itself():
    """Where all rows are sampled, a cost is 1/2 sum g_o e_o H e_o^T of the fit."""
    weight, mass, hessian = example(16)
    specs = [TensorSpec.from_name(name) for name in NAMES]
    costs = format_costs({"w": WeightInfo(weight=weight, row_mass=mass)}, specs, hessian)["w"]
    assert costs["f16"] == 0
    order = sampled_rows(((weight @ hessian) * weight).sum(1) * mass, 64)
    for spec in specs[:-1]:
        fitted = fit_with_hessian(weight[order], spec, hessian, num_sweeps=NUM_SWEEPS)
        error = fitted.dequantize() - weight[order]
        expected = sum(
            float(m * (e @ hessian @ e)) / 2 for m, e in zip(mass[order], error, strict=True)
        )
        assert costs[spec.name] == pytest.approx(expected, rel=1e-3)


def test_more_bits_cost_less_and_samples_agree():
    """Costs fall with bits; those of a sample are near those of all rows."""
    weight, mass, hessian = example(640)
    specs = [TensorSpec.from_name(name) for name in ("gguf:q2_0", "gguf:q4_0", "gguf:q8_0")]
    info = {"w": WeightInfo(weight=weight, row_mass=mass)}
    found = list(format_costs(info, specs, hessian)["w"].values())
    assert found[0] > 5 * found[1] > 25 * found[2]
    fitted = fit_with_hessian(weight, specs[1], hessian, num_sweeps=NUM_SWEEPS)
    error = fitted.dequantize() - weight
    whole = float((((error @ hessian) * error).sum(1) * mass).sum()) / 2
    assert found[1] == pytest.approx(whole, rel=0.1)


def test_weights_of_one_input_are_fitted_together():
    """Weights that share inputs cost what each costs alone."""
    weight, mass, hessian = example(96)
    info = WeightInfo(weight=weight, row_mass=mass)
    other = WeightInfo(weight=weight.flip(0) * 2, row_mass=mass.flip(0))
    specs = [TensorSpec.from_name("gguf:q4_0"), TensorSpec.from_name("lut2-g32")]
    joint = format_costs({"a": info, "b": other}, specs, hessian)
    for name, one in (("a", info), ("b", other)):
        alone = format_costs({name: one}, specs, hessian)[name]
        assert joint[name] == pytest.approx(alone, rel=1e-4)
