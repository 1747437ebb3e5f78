"""Against exact k-means on a line (kmeans1d), and what a codebook must not depend on."""

from itertools import combinations

import kmeans1d
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.grids.codebook import fit_codebook, weighted_kmeans
from qat.grids.scalar import snap_float16

FAMILIES = {
    "normal": lambda draw, count: draw.normal(size=count),
    "heavy-tailed": lambda draw, count: draw.standard_t(1.5, size=count),
    "bimodal": lambda draw, count: (
        np.where(draw.random(count) < 0.3, -3, 1) + 0.1 * draw.normal(size=count)
    ),
    "skewed": lambda draw, count: draw.lognormal(sigma=1.5, size=count),
    "one-outlier": lambda draw, count: np.append(draw.normal(size=count - 1), 1e4),
    "few-distinct": lambda draw, count: draw.integers(-5, 6, size=count) / 4,
}
WEIGHTS = {
    "equal": lambda draw, count: np.ones(count),
    "uneven": lambda draw, count: np.ceil(draw.lognormal(sigma=1.5, size=count)).clip(max=100),
}


def cost(points, counts, centers):
    """Return the weighted squared distance to the nearest center."""
    return (counts * np.abs(points[:, None] - centers[None, :]).min(1) ** 2).sum()


def exact_cost(points, counts, num_centers):
    """Return the least cost that any centers have, for whole counts."""
    repeated = np.repeat(points, counts.astype(int))
    found = kmeans1d.cluster(repeated, min(num_centers, len(np.unique(points))))
    return cost(points, counts, np.array(found.centroids))


def brute_force_cost(points, counts, num_centers):
    """Return the least cost over every way to cut a row of sorted points into intervals."""
    order = points.argsort()
    points, counts = points[order], counts[order]
    least = np.inf
    for cuts in combinations(range(1, len(points)), min(num_centers, len(points)) - 1):
        parts = zip(np.split(points, cuts), np.split(counts, cuts), strict=True)
        centers = np.array([(p * c).sum() / c.sum() for p, c in parts])
        least = min(least, cost(points, counts, centers))
    return least


@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("count", "bits"), [(5000, 2), (5000, 4), (700, 3)])
def test_within_half_a_percent_of_exact(family, weighting, count, bits):
    """Binning costs next to nothing, with more points than bins and with fewer."""
    draw = np.random.default_rng([count, bits])
    points, counts = FAMILIES[family](draw, count), WEIGHTS[weighting](draw, count)
    centers = weighted_kmeans(points, counts, 2**bits)
    assert len(centers) == 2**bits
    assert (np.diff(centers) >= 0).all()
    least = exact_cost(points, counts, 2**bits)
    total = (counts * points**2).sum()
    assert cost(points, counts, centers) <= 1.005 * least + 1e-12 * total


@settings(max_examples=40, deadline=None)
@given(
    points=st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=10),
    seed=st.integers(0, 99),
)
def test_few_points_are_solved_exactly(points, seed):
    """The least error there is, which is zero for four distinct points or fewer."""
    points = np.array(points)
    counts = np.random.default_rng(seed).uniform(0.1, 10, size=len(points))
    centers = weighted_kmeans(points, counts, 4)
    total = (counts * points**2).sum()
    assert cost(points, counts, centers) <= brute_force_cost(points, counts, 4) + 1e-9 * total


@pytest.mark.parametrize("value", [0.0, 3.5, -1e-6])
@pytest.mark.parametrize("count", [1, 10, 10_000])
def test_a_constant_is_found(value, count):
    """One distinct point: every value of the codebook is it."""
    centers = weighted_kmeans(np.full(count, value), np.ones(count), 4)
    assert centers == pytest.approx([value] * 4, abs=1e-15)


@pytest.mark.parametrize("count", [500, 9000])
def test_order_and_silent_points_do_not_matter(count):
    """Shuffling changes nothing beyond rounding, and points without weight change nothing."""
    draw = np.random.default_rng(0)
    points, counts = draw.standard_t(2, size=count), draw.lognormal(size=count)
    centers = weighted_kmeans(points, counts, 8)
    order = draw.permutation(count)
    assert weighted_kmeans(points[order], counts[order], 8) == pytest.approx(centers, rel=1e-2)
    silent = np.append(points, [7.0, -900.0]), np.append(counts, [0.0, 0.0])
    assert (weighted_kmeans(*silent, 8) == centers).all()


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_centers_scale_with_the_points(factor):
    """The unit of the weights is nobody's business."""
    draw = np.random.default_rng(1)
    points, counts = draw.normal(size=9000), np.ones(9000)
    centers = weighted_kmeans(points, counts, 4)
    assert weighted_kmeans(points * factor, counts, 4) == pytest.approx(centers * factor, rel=1e-6)


def test_a_codebook_is_ascending_and_on_the_float16_grid():
    """What is fitted is what a file can hold."""
    values = torch.randn(500, generator=torch.Generator().manual_seed(0))
    codebook = fit_codebook(values, torch.ones(500), 3)
    assert codebook.shape == (8,)
    assert torch.equal(snap_float16(codebook), codebook)
    assert (codebook.diff() > 0).all()


def test_weights_pull_values_to_them():
    """A point that counts a thousand times is hit almost exactly."""
    values = torch.linspace(-1, 1, 101)
    weights = torch.ones(101)
    weights[63] = 1e6
    codebook = fit_codebook(values, weights, 2)
    assert (codebook - values[63]).abs().min() < 1e-3


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(wrong):
    """Instead of a codebook of NaN."""
    with pytest.raises(ValueError, match="NaN or infinity; check the weights"):
        fit_codebook(torch.tensor([0.0, wrong]), torch.ones(2), 2)


def test_no_weight_at_all_is_refused():
    """A layer that saw no input has no best codebook."""
    with pytest.raises(ValueError, match="no positive weight; check the calibration"):
        fit_codebook(torch.ones(5), torch.zeros(5), 2)
