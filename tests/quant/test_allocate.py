"""Allocation against brute force, and what a frontier must be."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.quant.allocate import Allocation, Choice, allocate, frontier, lower_hull, smallest

CHOICES = st.lists(
    st.builds(
        Choice,
        spec=st.sampled_from("abcdef"),
        num_bytes=st.integers(1, 60),
        cost=st.floats(0, 1, allow_subnormal=False),
    ),
    min_size=1,
    max_size=4,
    unique=True,
)
TABLES = st.dictionaries(st.sampled_from("qkvo"), CHOICES, min_size=1)


def best_by_search(table, budget):
    """Return the least cost within a budget by trying everything; None where nothing fits."""
    fitting = [
        sum(choice.cost for choice in choices)
        for choices in itertools.product(*table.values())
        if sum(choice.num_bytes for choice in choices) <= budget
    ]
    return min(fitting, default=None)


@pytest.mark.recipe
@given(TABLES, st.integers(1, 240))
def test_fits_and_is_no_worse_than_the_frontier(table, budget):
    """An allocation keeps to its bytes, and beats every point of the frontier that does."""
    if best_by_search(table, budget) is None:
        with pytest.raises(ValueError, match="smallest formats"):
            allocate(table, budget)
        return
    found = allocate(table, budget)
    assert found.num_bytes <= budget
    fitting = [point for point in frontier(table) if point.num_bytes <= budget]
    assert found.cost <= min(point.cost for point in fitting) + 1e-12


@pytest.mark.recipe
@given(TABLES)
def test_frontier_points_are_optimal(table):
    """No allocation of a frontier point's bytes or fewer costs less."""
    points = list(frontier(table))
    sizes = [point.num_bytes for point in points]
    assert sizes == sorted(sizes)
    for point in points:
        assert point.cost <= best_by_search(table, point.num_bytes) + 1e-9


@given(CHOICES)
def test_hull_is_convex_and_below_all(choices):
    """Each byte more saves less than the one before; no choice lies under the hull's ends."""
    hull = lower_hull(choices)
    slopes = [(b.cost - a.cost) / (b.num_bytes - a.num_bytes) for a, b in itertools.pairwise(hull)]
    assert all(s < 0 for s in slopes)
    assert slopes == sorted(slopes)
    assert hull[-1].cost == min(choice.cost for choice in choices)
    assert hull[0].num_bytes == min(choice.num_bytes for choice in choices)


def test_repair_spends_what_a_large_step_leaves():
    """A step that does not fit leaves bytes to smaller tensors."""
    table = {
        "large": [Choice("2", 100, 1.0), Choice("4", 200, 0.0)],
        "small": [Choice("2", 10, 0.05), Choice("4", 20, 0.04)],
    }
    found = allocate(table, 150)
    assert {name: choice.spec for name, choice in found.choices.items()} == {
        "large": "2",
        "small": "4",
    }


def test_pairs_trade_bytes_between_tensors():
    """Where no single change fits, one tensor pays for another."""
    table = {
        "a": [Choice("2", 10, 0.5), Choice("3", 14, 0.3), Choice("4", 20, 0.29)],
        "b": [Choice("2", 10, 0.9), Choice("4", 21, 0.0)],
    }
    start = Allocation({"a": table["a"][2], "b": table["b"][0]})
    assert start.num_bytes == 30
    assert allocate(table, 32).cost == pytest.approx(0.5)


def test_smallest_takes_the_better_of_equal_sizes():
    """Of two formats of one size the one of less cost counts."""
    table = {"a": [Choice("int", 10, 0.5), Choice("lut", 10, 0.4), Choice("4", 20, 0.1)]}
    assert smallest(table).choices["a"].spec == "lut"
