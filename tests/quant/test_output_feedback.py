"""Rows in turns against the sum that they lower, and against fits that know no other row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.quant import output_feedback
from qat.quant.hessian import fit_with_hessian
from qat.quant.output_feedback import fit_in_turns
from qat.quant.spec import TensorSpec

Q2 = TensorSpec.from_name("gguf:q2_0")


def gram_of(num_outputs, seed=0, rank=4):
    """Return G of outputs that move together in a few directions."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(num_outputs, rank, generator=generator)
    return shared @ shared.T + 0.3 * torch.eye(num_outputs)


def example(num_rows, num_inputs=64, seed=0):
    """Return a weight, and H."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, num_inputs, generator=generator) * torch.linspace(0.3, 2, num_inputs)
    return torch.randn(num_rows, num_inputs, generator=generator), x.T @ x / 512


def cost(weight, quantized, gram, hessian):
    """Return tr(G E H E^T)."""
    error = quantized.dequantize() - weight
    return float(((gram @ error) * (error @ hessian)).sum())


def fit_against(hessian, spec=Q2):
    """Return the fit of rows that a turn takes."""
    return lambda rows, wanted: fit_with_hessian(rows, spec, hessian, target=wanted)


@pytest.mark.recipe
@pytest.mark.parametrize("name", ["gguf:q2_0", "gguf:q4_0", "gguf:q4_1"])
@pytest.mark.parametrize("shape", [(96, 64), (32, 64)])
def test_related_outputs_make_up_for_each_other(name, shape):
    """The sum over all pairs of outputs is far lower than that of rows fitted alone."""
    spec = TensorSpec.from_name(name)
    weight, hessian = example(*shape)
    gram = gram_of(len(weight))
    fit = fit_against(hessian, spec)
    alone, in_turns = fit(weight, weight), fit_in_turns([weight], [weight], [gram], fit)
    lower = cost(weight, in_turns, gram, hessian) / cost(weight, alone, gram, hessian)
    assert lower < 0.75


def test_each_row_aims_at_what_earlier_errors_leave(monkeypatch):
    """With a turn for each row, targets are those of the definition: -(G_rest^-1 G) of errors."""
    monkeypatch.setattr(output_feedback, "NUM_TURNS", 99)
    monkeypatch.setattr(output_feedback, "FEW_TURNS", 99)
    weight, hessian = example(6)
    gram, asked = gram_of(6), []

    def fit(rows, wanted):
        asked.append(wanted)
        return fit_with_hessian(rows, Q2, hessian, target=wanted)

    found = fit_in_turns([weight], [weight], [gram], fit)
    damped = gram / gram.diagonal().mean() + output_feedback.DAMPING * torch.eye(6)
    order = damped.diagonal().argsort(descending=True, stable=True)
    damped, error = damped[order][:, order].double(), (found.dequantize() - weight)[order].double()
    for row in range(1, 6):
        # The best errors of this row and those after it, were they free, given those before.
        best = -torch.linalg.solve(damped[row:, row:], damped[row:, :row] @ error[:row])
        expected = weight[order[row]] + best[0]
        assert torch.allclose(asked[row][0].double(), expected, atol=1e-4)


@pytest.mark.recipe
@given(sizes=st.lists(st.integers(1, 24), min_size=1, max_size=4), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=8)
def test_unrelated_outputs_are_fitted_as_they_would_be_alone(sizes, seed):
    """A diagonal G changes the order of rows, not what is wanted of them, nor their places."""
    weight, hessian = example(sum(sizes), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    grams = [torch.rand(size, generator=generator).diag() for size in sizes]
    rows, fit = weight.split(sizes), fit_against(hessian)
    found, alone = fit_in_turns(rows, rows, grams, fit), fit(weight, weight)
    assert torch.allclose(found.dequantize(), alone.dequantize(), atol=1e-5)
