"""Codebooks: weighted one-dimensional k-means, exact on a histogram.

The weights of a tensor are binned (weight, sum and sum of squares per bin), the best partition of
the bins into C intervals is found by dynamic programming, and scikit-learn's weighted k-means
polishes it on finer bins. The histogram bounds the cost whatever the tensor's size.

    cost(i, j) = sum w x^2 - (sum w x)^2 / sum w        over bins i .. j - 1
    best[c, j] = min over i of best[c - 1, i] + cost(i, j)

Shape legend: N values, M bins, C codebook values.

Source: exact one-dimensional k-means by dynamic programming, Gronlund et al. 2017,
arXiv:1701.07204, section 2.
"""

import numpy as np
import torch
from torch import Tensor

from qat.grids.scalar import snap_float16

COARSE_BINS = 512  # M x M costs: 0.3 M numbers, 10 ms for C = 16
FINE_BINS = 4096
SAMPLE = 65536  # values whose median sets the bins' width


def fit_codebook(values: Tensor, weights: Tensor, bits: int) -> Tensor:
    """Return the 2**bits values of least weighted squared error, ascending, on the float16 grid.

    Args:
        values: (N,), finite: weights divided by their scales.
        weights: (N,), not negative: how much each value's squared error counts.
        bits: Bits per index.

    Raises:
        ValueError: If a value is not finite or no value has a weight.
    """
    if not torch.isfinite(values).all():
        raise ValueError("codebook input holds NaN or infinity; check the weights of this layer")
    points = values.detach().double().flatten().cpu().numpy()
    counts = weights.detach().double().flatten().cpu().numpy()
    if counts.sum() <= 0:
        raise ValueError("codebook input has no positive weight; check the calibration statistics")
    centers = weighted_kmeans(points, counts, 2**bits)
    return snap_float16(torch.from_numpy(centers).float().to(values.device))


def weighted_kmeans(points: np.ndarray, counts: np.ndarray, num_centers: int) -> np.ndarray:
    """Return `num_centers` ascending centers of weighted k-means on a line.

    Fewer distinct points than centers is no error: the last center is repeated.

    Args:
        points: (N,) float64.
        counts: (N,) float64, not negative.
        num_centers: C.
    """
    points, counts = histogram(points, counts)
    centers = best_partition(*coarsen(points, counts), num_centers)
    if len(centers) < num_centers:
        return np.pad(centers, (0, num_centers - len(centers)), mode="edge")
    return polish(points, counts, centers)


def histogram(points: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted mean and the weight of each non-empty bin, ascending.

    Bins are even in asinh(x / median |x|): fine in the body, relative in a long tail.
    """
    keep = counts > 0
    points, counts = points[keep], counts[keep]
    if len(points) <= FINE_BINS:
        distinct, bins = np.unique(points, return_inverse=True)
        return distinct, np.bincount(bins, weights=counts)
    middle = np.median(np.abs(points[:: 1 + len(points) // SAMPLE])) or np.abs(points).max() or 1.0
    position = np.arcsinh(points / middle)
    low, high = position.min(), position.max()
    bins = ((position - low) * (FINE_BINS - 1) / max(high - low, 1e-12)).astype(np.int32)
    mass = np.bincount(bins, weights=counts)
    total = np.bincount(bins, weights=counts * points)
    filled = mass > 0
    return total[filled] / mass[filled], mass[filled]


def coarsen(points: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return about `COARSE_BINS` bins merged from finer ones, dense where centers will be.

    The best centers of many have a density that goes with the cube root of the points' own
    (Panter and Dite 1951), so each merged bin takes an equal share of that.
    """
    if len(points) <= COARSE_BINS:
        return points, counts
    widths = np.gradient(points)
    share = np.cbrt(counts * widths**2)  # cbrt(density) * width
    for _ in range(3):  # a point needs no more than a bin of its own, however far it lies
        share = np.minimum(share, share.sum() / COARSE_BINS)
    share = np.cumsum(share)
    bins = (share / share[-1] * (COARSE_BINS - 1)).astype(np.int64)
    mass = np.bincount(bins, weights=counts)
    total = np.bincount(bins, weights=counts * points)
    filled = mass > 0
    return total[filled] / mass[filled], mass[filled]


def best_partition(points: np.ndarray, counts: np.ndarray, num_centers: int) -> np.ndarray:
    """Return the centers of the exact best partition of M ascending weighted points."""
    num_points = len(points)
    num_centers = min(num_centers, num_points)
    mass = np.concatenate([[0.0], np.cumsum(counts)])
    first = np.concatenate([[0.0], np.cumsum(counts * points)])
    second = np.concatenate([[0.0], np.cumsum(counts * points**2)])
    places = np.arange(num_points + 1)
    # (M + 1, M + 1) each, row j and column i for bins i .. j - 1. In place, as each further table
    # costs its page faults.
    spans, moments, cost = (sums[:, None] - sums[None, :] for sums in (mass, first, second))
    with np.errstate(divide="ignore", invalid="ignore"):
        moments *= moments
        moments /= spans
    cost -= moments
    cost[places[None, :] >= places[:, None]] = np.inf  # an interval holds at least one bin
    best = cost[:, 0].copy()
    starts = np.zeros((num_centers, num_points + 1), dtype=np.int64)
    candidates = spans  # whose memory serves all centers
    for center in range(1, num_centers):
        np.add(cost, best, out=candidates)
        starts[center] = candidates.argmin(axis=1)  # along rows, several times as fast as across
        best = candidates[places, starts[center]]
    centers = np.empty(num_centers)
    end = num_points
    for center in reversed(range(num_centers)):
        start = starts[center, end]
        centers[center] = (first[end] - first[start]) / (mass[end] - mass[start])
        end = start
    return centers


def polish(points: np.ndarray, counts: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Return centers after Lloyd's steps on finer bins, never worse than those given."""
    from sklearn.cluster import KMeans

    scale = np.abs(points).max() or 1.0
    means = KMeans(len(centers), init=(centers / scale)[:, None], n_init=1, max_iter=50, tol=1e-7)
    means.fit((points / scale)[:, None], sample_weight=counts / counts.max())
    return np.sort(means.cluster_centers_[:, 0]) * scale
