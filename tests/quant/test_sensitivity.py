"""Predicted costs of formats against the sums that they stand for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.quant.hessian import fit_with_hessian
from qat.quant.sensitivity import NUM_SWEEPS, WeightInfo, format_costs, sample_rows
from qat.quant.spec import TensorSpec

NAMES = ("gguf:q2_0", "lut3-g32", "gguf:q4_0", "gguf:q8_0", "f16")


def example(num_rows, num_inputs=64):
    """Return a weight, row masses and an H."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, num_inputs, generator=generator) * torch.linspace(0.2, 2, num_inputs)
    weight = torch.randn(num_rows, num_inputs, generator=generator)
    mass = torch.rand(num_rows, generator=generator) + 0.1
    return weight, mass, x.T @ x / 256


@pytest.mark.parametrize("name", NAMES[:3])
def test_cost_of_few_rows_is_the_sum_itself(name):
    """The first format of a kind costs 1/2 sum g_o e_o H e_o^T of its fit with error feedback."""
    weight, mass, hessian = example(16)
    spec = TensorSpec.from_name(name)
    info = {"w": WeightInfo(weight=weight, row_mass=mass)}
    costs = format_costs(info, [spec, TensorSpec.from_name("f16")], hessian)["w"]
    assert costs["f16"] == 0
    order, times = sample_rows(((weight @ hessian) * weight).sum(1) * mass, 64)
    assert (times == 1).all()
    fitted = fit_with_hessian(weight[order], spec, hessian, num_sweeps=NUM_SWEEPS)
    error = fitted.dequantize() - weight[order]
    expected = sum(
        float(m * (e @ hessian @ e)) / 2 for m, e in zip(mass[order], error, strict=True)
    )
    assert costs[spec.name] == pytest.approx(expected, rel=1e-3)


@pytest.mark.recipe
def test_gains_of_one_format_hold_for_others_of_its_kind():
    """Costs of all formats together are near those of each alone."""
    weight, mass, hessian = example(256)
    info = {"w": WeightInfo(weight=weight, row_mass=mass)}
    specs = [TensorSpec.from_name(f"gguf:{kind}") for kind in ("q4_0", "q4_1", "q5_0", "iq4_nl")]
    together = format_costs(info, specs, hessian)["w"]
    for spec in specs:
        assert together[spec.name] == pytest.approx(
            format_costs(info, [spec], hessian)["w"][spec.name], rel=0.25
        )


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


def test_a_row_that_holds_most_of_the_cost_is_in_the_sample():
    """Costs are right where few rows hold them, and errors of these are unlike the others'."""
    weight, mass, hessian = example(640)
    mass[7], mass[100] = 1000, 300
    weight[7, ::16] *= 8  # outliers: a coarser grid for the row's other weights
    specs = [TensorSpec.from_name(name) for name in ("gguf:q2_0", "gguf:q4_0")]
    found = format_costs({"w": WeightInfo(weight=weight, row_mass=mass)}, specs, hessian)["w"]
    for spec in specs:
        fitted = fit_with_hessian(weight, spec, hessian, num_sweeps=NUM_SWEEPS)
        error = fitted.dequantize() - weight
        whole = float((((error @ hessian) * error).sum(1) * mass).sum()) / 2
        assert found[spec.name] == pytest.approx(whole, rel=0.2), spec.name


@pytest.mark.recipe
def test_a_row_that_is_hard_to_hold_stands_for_itself_alone():
    """Of vector grids fewer rows are drawn: the largest counts by its share there as well."""
    weight, mass, hessian = example(256, 256)
    hard, weight = weight[7], weight.sign()  # of one magnitude: nearly as they are
    weight[7] = hard
    energy = ((weight @ hessian) * weight).sum(1) * mass
    mass[7] *= energy.sum() / energy[7]  # half of all
    spec = TensorSpec.from_name("gguf:iq2_s")
    info = {"w": WeightInfo(weight=weight, row_mass=mass)}
    found = format_costs(info, [spec], hessian)["w"][spec.name]
    error = fit_with_hessian(weight, spec, hessian, num_sweeps=NUM_SWEEPS).dequantize() - weight
    errors = ((error @ hessian) * error).sum(1) * mass
    assert errors[7] > 0.9 * errors.sum()
    assert found == pytest.approx(float(errors.sum()) / 2, rel=0.2)


@pytest.mark.recipe
@given(
    energies=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=200),
    count=st.integers(1, 64),
)
def test_rows_are_drawn_in_proportion_to_their_cost(energies, count):
    """Each row comes as often as its share of the draws, rounded either way; none twice."""
    energy = torch.tensor(energies)
    rows, times = sample_rows(energy, count)
    assert len(rows.unique()) == len(rows)
    if len(energies) <= count:
        assert sorted(rows.tolist()) == list(range(len(energies)))
    else:
        assert times.sum() == count
        if energy.sum() > 0:
            shares = energy[rows] / energy.sum() * count
            assert (times - shares).abs().max() < 1.01


@pytest.mark.recipe
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
