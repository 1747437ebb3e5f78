import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.grids.scalar import FLOAT16_TINY, expand_groups, low_rank_scale, snap_float16
from qat.grids.scales import (
    exact_in_float16,
    fit_group_scale,
    fit_low_rank,
    solve_rows,
    start_low_rank,
    start_scale,
    stored_scale,
    unit_factors,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weighted_error(weight, values, scale, importance):
    """Return the error per weight matrix in float64."""
    full = expand_groups(scale, weight.shape[1]).double()
    return ((weight - values * full) ** 2 * importance).sum()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    size=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_a_groups_scale_is_that_of_least_squares(rows, groups, size, seed):
    """Equal to lstsq group by group, to float16; where it is not positive the former stays."""
    weight, values = (
        random(rows, groups * size, seed=seed),
        random(rows, groups * size, seed=seed + 1),
    )
    importance = random(groups * size, seed=seed + 2).exp()
    former = torch.full((rows, groups), 0.25)
    fitted = fit_group_scale(weight, values, importance, former)
    root = importance.sqrt().double()
    for row in range(rows):
        for group in range(groups):
            inside = slice(group * size, (group + 1) * size)
            c = (values[row, inside] * root[inside]).unsqueeze(1)
            w = (weight[row, inside] * root[inside]).unsqueeze(1)
            best = torch.linalg.lstsq(c, w).solution.item()
            expected = max(best, FLOAT16_TINY) if best > 0 else 0.25
            assert fitted[row, group].item() == pytest.approx(expected, rel=2e-3)


def test_a_refitted_scale_never_raises_the_error():
    """Beyond what rounding the scale to float16 costs."""
    for seed in range(20):
        weight, values = random(6, 32, seed=seed), random(6, 32, seed=seed + 50).round()
        importance = random(32, seed=seed + 100).exp()
        former = stored_scale(random(6, 4, seed=seed).abs())
        fitted = fit_group_scale(weight, values, importance, former)
        rounding = ((values * expand_groups(fitted, 32) * 2**-11) ** 2 * importance).sum()
        before = weighted_error(weight, values, former, importance)
        assert weighted_error(weight, values, fitted, importance) <= before + rounding


def test_stored_scales_are_float16_in_its_normal_range():
    """Below it a scale would lose bits; above it a file could not hold it."""
    scale = stored_scale(torch.tensor([0.0, 1e-20, 0.3, 1e9]))
    assert torch.equal(snap_float16(scale), scale)
    assert scale[:2].tolist() == [FLOAT16_TINY] * 2
    assert scale[3] == 65504.0


def test_the_first_scale_is_the_weighted_root_mean_square():
    """By a double loop."""
    weight, importance = random(2, 6), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    scale = start_scale(weight, importance, 2)
    for row in range(2):
        for group in range(2):
            w, h = weight[row, group * 3 : group * 3 + 3], importance[group * 3 : group * 3 + 3]
            expected = ((w**2 * h).sum() / h.sum()).sqrt()
            assert scale[row, group] == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_rows_are_solved_as_lstsq_does(rank):
    """All rows in one batch equal one weighted least squares a row."""
    mass, wanted, basis = random(7, 20).square(), random(7, 20, seed=1), random(rank, 20, seed=2)
    rows = solve_rows(mass, mass * wanted, basis)
    for row in range(7):
        root = mass[row].sqrt().unsqueeze(1)
        solution = torch.linalg.lstsq(root * basis.T, root * wanted[row].unsqueeze(1)).solution
        assert torch.allclose(rows[row], solution.squeeze(1), atol=1e-3)


def test_rows_of_a_singular_system_stay_finite():
    """Equal rows in the basis, and rows without any mass: some answer, but a finite one."""
    basis = random(1, 10).repeat(3, 1)
    mass = random(4, 10).square()
    mass[2] = 0.0
    rows = solve_rows(mass, mass * 2.0, basis)
    assert torch.isfinite(rows).all()


@pytest.mark.parametrize("rank", [1, 4])
def test_each_round_of_low_rank_fitting_lowers_the_error(rank):
    """Alternating least squares never goes up, beyond float16 rounding of its factors."""
    weight, values = random(24, 32), random(24, 32, seed=1).round() + 0.5
    importance = random(32, seed=2).exp()
    low_rank = unit_factors(random(24, rank, seed=3), random(rank, 32, seed=4))
    errors = []
    for _ in range(6):
        scale = low_rank_scale(*low_rank)
        errors.append(float(((weight - values * scale) ** 2 * importance).sum()))
        low_rank = fit_low_rank(weight, values, importance, low_rank, num_rounds=1)
    assert all(after <= before * 1.001 for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < errors[0]


def test_low_rank_fitting_finds_scales_that_are_of_that_rank():
    """W = c * S with S of rank 2 is fitted without an error but rounding."""
    scale = low_rank_scale(*unit_factors(random(16, 2).abs() + 1, random(2, 24, seed=1).abs() + 1))
    values = random(16, 24, seed=2)
    start = unit_factors(random(16, 2, seed=3), random(2, 24, seed=4))
    found = fit_low_rank(values * scale, values, torch.ones(24), start, num_rounds=30)
    assert torch.allclose(low_rank_scale(*found), scale, rtol=0.02, atol=0.02)


def test_factors_keep_their_product():
    """Unit columns of A, unit rows of B, magnitudes falling; the product is the same to float16."""
    rows, columns = random(9, 3), random(3, 11, seed=1)
    low_rank = unit_factors(rows, columns)
    assert torch.allclose(low_rank_scale(*low_rank), rows @ columns, atol=0.02)
    assert torch.allclose(low_rank.scale_a.norm(dim=0), torch.ones(3), atol=1e-3)
    assert torch.allclose(low_rank.scale_b.norm(dim=1), torch.ones(3), atol=1e-3)
    assert (low_rank.magnitude.diff() <= 0).all()
    for factor in low_rank:
        assert torch.equal(snap_float16(factor), factor)


def test_factors_of_nothing_are_finite():
    """A component of zeros has no direction, and no NaN either."""
    assert all(torch.isfinite(part).all() for part in unit_factors(torch.zeros(4, 2), random(2, 5)))


def test_the_start_is_the_best_of_its_rank():
    """Close to a full SVD, and exact for a matrix of that rank."""
    scale = random(20, 3).abs() @ random(3, 30, seed=1).abs()
    assert torch.allclose(low_rank_scale(*start_low_rank(scale, 3)), scale, atol=1e-3)
    noisy = scale + 0.1 * random(20, 30, seed=2)
    left, singular, right = torch.linalg.svd(noisy, full_matrices=False)
    best = (noisy - (left[:, :3] * singular[:3]) @ right[:3]).norm()
    assert (noisy - low_rank_scale(*start_low_rank(noisy, 3))).norm() <= 1.01 * best


def test_the_start_neither_depends_on_luck_nor_uses_any():
    """The same result under any seed, and the caller's random numbers go on as if not called."""
    scale = random(12, 16)
    torch.manual_seed(1)
    first = start_low_rank(scale, 2)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    torch.manual_seed(99)
    second = start_low_rank(scale, 2)
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


def test_low_rank_scales_start_the_same_and_leave_the_generator_alone():
    """As after `torch.manual_seed(0)`, which started every accelerator's generator anew as well."""
    scale = random(24, 16).abs()
    state = torch.get_rng_state()
    found = start_low_rank(scale, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    left, singular, right = torch.svd_lowrank(scale, q=7, niter=4)
    for part, expected in zip(found, (left[:, :3], singular[:3], right[:, :3].T), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), size=st.integers(-20, 8))
def test_exact_pairs_round_at_no_step_of_float16(bits, seed, size):
    """For every index; pairs that are exact stay; no number moves by more than the reach allows."""
    generator = torch.Generator().manual_seed(seed)
    top = 2**bits - 1
    scale = snap_float16(torch.rand(7, 5, generator=generator) * 2.0**size + 2.0**-14)
    offset = snap_float16(torch.randn(7, 5, generator=generator) * scale * top)
    exact = exact_in_float16(scale, offset, top)
    for index in range(top + 1):
        product = index * exact[0]
        assert torch.equal(product.half().float(), product)
        assert torch.equal((product + exact[1]).half().float(), product + exact[1])
    again = exact_in_float16(*exact, top)
    assert all(torch.equal(a, b) for a, b in zip(again, exact, strict=True))
    reach = torch.maximum(offset.abs(), top * scale) + top * scale
    moved = max(
        float(((a - b).abs() / reach).max()) for a, b in zip(exact, (scale, offset), strict=True)
    )
    assert moved <= 1 / 1024
