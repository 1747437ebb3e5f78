import pytest
import torch

from qat.quant.normal_equations import (
    change_in_error,
    group_products,
    group_sums,
    solve_damped,
    with_offsets,
)


def problem(num_rows=3, num_inputs=8):
    """Return values (O, I) and a positive definite H (I, I)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, num_inputs, generator=generator)
    return torch.randn(num_rows, num_inputs, generator=generator), x.T @ x


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_products_are_the_double_sum(num_groups):
    """sum over i in g, j in h of c_i H_ij d_j, with d = c and with ones."""
    values, hessian = problem()
    size = values.shape[1] // num_groups
    for others in (None, torch.ones(1, values.shape[1])):
        found = group_products(values, hessian, num_groups, others)
        d = values if others is None else others.expand_as(values)
        for row in range(len(values)):
            terms = values[row, :, None] * hessian * d[row]
            expected = terms.view(num_groups, size, num_groups, size).sum((1, 3))
            assert torch.allclose(found[row], expected, rtol=1e-4, atol=1e-3)
    assert torch.allclose(group_sums(values, num_groups).sum(1), values.sum(1), atol=1e-5)


def test_the_solution_is_the_least_value_of_the_quadratic():
    """Of scales and offsets together: no neighbour is below it."""
    values, hessian = problem()
    normal = with_offsets(group_products(values, hessian, 2), values, hessian, 2)
    wanted = torch.randn(len(values), 4, generator=torch.Generator().manual_seed(1))
    x = solve_damped(normal, wanted)
    for step in torch.eye(4):
        assert (change_in_error(normal, wanted, x + 0.1 * step, x) >= -1e-5).all()
        assert (change_in_error(normal, wanted, x - 0.1 * step, x) >= -1e-5).all()


def test_a_change_is_the_difference_of_both_errors():
    """In float64, of x^T N x - 2 w^T x."""
    generator = torch.Generator().manual_seed(2)
    root, wanted = (torch.randn(*shape, generator=generator) for shape in ((5, 6, 9), (5, 6)))
    x, former = torch.randn(2, 5, 6, generator=generator).double()
    normal, wanted = (root @ root.transpose(1, 2)).double(), wanted.double()

    def error(x):
        return torch.einsum("ni,nij,nj->n", x, normal, x) - 2 * (wanted * x).sum(-1)

    found = change_in_error(*(part.float() for part in (normal, wanted, x, former)))
    assert torch.allclose(found.double(), error(x) - error(former), rtol=1e-4, atol=1e-4)


def test_a_singular_system_has_a_finite_solution():
    """Groups whose values are all zero occur in every model."""
    assert torch.isfinite(solve_damped(torch.zeros(2, 3, 3), torch.zeros(2, 3))).all()
