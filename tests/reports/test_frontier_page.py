"""The plot holds every point inside its axes, with its numbers, also without JavaScript."""

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.reports.compare import Table
from qat.reports.frontier_page import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Mark,
    Series,
    as_page,
    frame_of,
    log_ticks,
    svg,
    ticks,
)

AXES = ("size", "KL")
sizes = st.floats(1.0, 1e5)
values = st.floats(1e-4, 20.0)
points = st.lists(st.tuples(sizes, values), min_size=1, max_size=9)


def series_of(pairs, name="s", predicted=()):
    """Return a series whose marks say their place."""
    return Series(name, [Mark(x, y, [f"{x}", f"KL: {y}"]) for x, y in pairs], list(predicted))


@pytest.mark.recipe
@given(points, points)
def test_every_point_lies_inside_the_axes(pairs, predicted):
    """Of one file too, and of files of equal sizes."""
    frame = frame_of([series_of(pairs, predicted=predicted)])
    for x, y in pairs + predicted:
        assert LEFT < frame.x(x) < WIDTH - RIGHT
        assert TOP < frame.y(y) < HEIGHT - BOTTOM


@given(points)
def test_axes_have_round_numbers(pairs):
    """Inside the axes, ascending, enough of them to read values from."""
    frame = frame_of([series_of(pairs)])
    across, up = ticks(frame.left, frame.right), log_ticks(frame.bottom, frame.top)
    assert 2 <= len(across) <= 10
    assert 1 <= len(up) <= 12
    assert across == sorted(across)
    assert all(frame.left <= value <= frame.right for value in across)
    assert all(frame.bottom <= math.log10(value) <= frame.top for value in up)


def test_ticks_are_those_of_a_hand_drawn_axis():
    """Tens of megabytes; 1, 2 and 5 of two decades."""
    assert ticks(42, 113) == [50, 60, 70, 80, 90, 100, 110]
    assert log_ticks(-2.1, 0.4) == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]
    assert log_ticks(-4.2, 0.4) == [1e-4, 1e-3, 1e-2, 1e-1, 1]


def test_each_point_can_be_focused_and_tells_its_numbers():
    """The drawing is well-formed; a browser shows the titles where no script runs."""
    drawn = [series_of([(45, 1.0), (55, 0.5)], predicted=[(45, 0.9), (55, 0.6)])]
    drawn += [series_of([(50, 0.7)], "peer")]
    tree = ElementTree.fromstring(svg("name", drawn, AXES))
    found = tree.findall(".//g[@class='point']")
    assert [one.find("title").text for one in found] == [
        "45\nKL: 1.0",
        "55\nKL: 0.5",
        "50\nKL: 0.7",
    ]
    assert all(one.get("tabindex") == "0" for one in found)
    assert len(tree.findall(".//path[@class='predicted']")) == 1


@pytest.mark.parametrize("count", [1, 9])
def test_series_beyond_the_last_color_begin_again(count):
    """Each has its line in the legend."""
    drawn = [series_of([(index + 1, 1.0)], f"series {index}") for index in range(count)]
    page = as_page("t", [], drawn, AXES, Table(["file"], [["a"]]))
    assert page.count("<li>") == count
    assert page.count('class="point"') == count
