"""The search of scales: against trying very many, and on weights that lie on the grid."""

import pytest
import torch

from qat.grids import search
from qat.grids.scalar import (
    POWER_RANGE,
    ScalarGrid,
    dequantize,
    fixed_codebook,
    nearest_values,
    over_scale,
)
from qat.grids.scales import GroupScale, group_error
from qat.grids.search import search_affine, search_scale

EVEN = torch.ones(64)
STEEP = torch.randn(64, generator=torch.Generator().manual_seed(9)).exp().square()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error_of(weight, importance, codebook, *scales):
    values = nearest_values(over_scale(weight, *scales), codebook)
    return group_error(weight, values, *scales, importance=importance)


def least_of_many(weight, importance, codebook, scales):
    errors = [error_of(weight, importance, codebook, scale) for scale in scales]
    return torch.stack(errors).amin(0)


@pytest.mark.parametrize("importance", [EVEN, STEEP], ids=["even", "steep"])
@pytest.mark.parametrize("bits", [3, 4, 5])
def test_few_candidates_come_near_to_many(bits, importance):
    """Within a twentieth of the best of 800 scales of either sign, in sum."""
    weight, codebook = random(16, 64), fixed_codebook("int", bits)
    found = search_scale(
        weight, importance, ScalarGrid(bits, "int"), GroupScale(32), is_signed=True
    )
    largest = weight.view(16, 2, 32).abs().amax(-1) / 2 ** (bits - 1)
    factors = torch.linspace(0.1, 1.2, 400)
    many = [largest * factor * sign for factor in factors for sign in (1, -1)]
    least = least_of_many(weight, importance, codebook, many)
    assert error_of(weight, importance, codebook, found).sum() <= 1.05 * least.sum()


@pytest.mark.parametrize("importance", [EVEN, STEEP], ids=["even", "steep"])
def test_powers_of_two_are_searched_to_the_end(importance):
    """The best of all that the form has, in each group."""
    weight, codebook = random(16, 64), fixed_codebook("mxfp4", 4)
    form = GroupScale(32, is_power=True)
    found = search_scale(weight, importance, ScalarGrid(4, "mxfp4"), form, is_signed=False)
    low, high = (int(torch.tensor(end).log2()) for end in POWER_RANGE)
    many = [torch.full((16, 2), 2.0**power) for power in range(low, high + 1)]
    least = least_of_many(weight, importance, codebook, many)
    assert torch.equal(error_of(weight, importance, codebook, found), least)


@pytest.mark.parametrize("sign", [1, -1])
def test_integers_times_a_scale_are_found(sign):
    """Where a group's largest weight lies on the end of the grid's longer arm."""
    indices = torch.randint(16, (8, 64), generator=torch.Generator().manual_seed(0))
    indices[:, ::32] = 0
    codebook, scale = fixed_codebook("int", 4), torch.full((8, 2), sign * 0.0375).half().float()
    weight = dequantize(indices, scale, codebook)
    found = search_scale(weight, EVEN, ScalarGrid(4, "int"), GroupScale(32), is_signed=True)
    assert torch.equal(found, scale)


def test_each_end_of_an_affine_grid_may_clip():
    """One outlier of no importance: the grid spans the others alone."""
    weight, importance = random(8, 32), torch.ones(32)
    weight[:, 7], importance[7] = 20.0, 1e-4
    scale, offset = search_affine(weight, importance, ScalarGrid(4, "uint"), 1)
    assert (offset + 15 * scale < 12).all()
    assert (offset < 0).all()


@pytest.mark.parametrize("kind", ["int", "uint", "iq4_nl"])
def test_rows_are_searched_apart(kind, monkeypatch):
    """A chunk of rows at a time gives what all at once give."""
    weight, grid = random(12, 64), ScalarGrid(4, kind)

    def found():
        if kind == "uint":
            return torch.cat(search_affine(weight, STEEP, grid, 2))
        return search_scale(weight, STEEP, grid, GroupScale(32), is_signed=True)

    whole = found()
    monkeypatch.setattr(search, "numbers_at_once", lambda _device: 5 * 64)
    assert torch.equal(found(), whole)
