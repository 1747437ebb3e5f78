"""Measured files become a table, a plot and a page that say what was measured."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from qat.reports.frontier import (
    LEAST_KL,
    FrontierPoint,
    drawn_series,
    frontier_table,
    rank_correlation,
    read_points,
    write_frontier,
    write_points,
)

NASTY = '<script>alert("x")</script>|\n& </title>'


def make_points(pairs, series="trained", **fields):
    """Return points of (MB, KL) pairs."""
    return [
        FrontierPoint(series=series, label=f"{mb} MB", file_bytes=mb * 10**6, kl_nats=kl, **fields)
        for mb, kl in pairs
    ]


def test_points_come_back_from_their_file(tmp_path):
    """Every field, absent ones too; a key that no point has is refused with the file's name."""
    points = make_points([(45, 1.0), (55, 0.5)], kl_p99=3.0, note=NASTY)
    points += make_points([(45, 0.7)], "other", predicted_kl_nats=0.75, top1_agreement=0.5)
    path = tmp_path / "points.jsonl"
    write_points(path, points)
    assert read_points(path) == points
    path.write_text(json.dumps({"series": "s", "label": "l", "file_bytes": 1, "kl": 0.1}))
    with pytest.raises(ValueError, match=r"points.jsonl kl is not one of series"):
        read_points(path)


@pytest.mark.parametrize(("num_bytes", "kl"), [(0, 1.0), (1, math.nan), (1, math.inf)])
def test_numbers_that_no_axis_has_are_refused(num_bytes, kl):
    """A broken model's KL is no point at the edge of the plot."""
    with pytest.raises(ValueError, match="measure the file again"):
        FrontierPoint(series="s", label="l", file_bytes=num_bytes, kl_nats=kl)


values = st.integers(0, 6).map(float)  # few, so that ties are common


@pytest.mark.recipe
@given(st.lists(st.tuples(values, values), min_size=3, max_size=12))
def test_rank_correlation_is_scipys(pairs):
    """Ties share the mean of their ranks; where all are equal there is none."""
    points = [
        FrontierPoint(series="s", label="l", file_bytes=1, kl_nats=kl, predicted_kl_nats=predicted)
        for predicted, kl in pairs
    ]
    points += make_points([(1, 0.5)])  # without a prediction: not counted
    found = rank_correlation(points)
    if any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(*zip(*pairs, strict=True)).statistic)
    assert rank_correlation(points[:2]) is None


def test_the_table_marks_the_frontier():
    """A row a file, by series and bytes; marked where no smaller file is nearer to the teacher."""
    points = make_points([(55, 0.5), (45, 1.0), (65, 0.6)]) + make_points([(55, 0.4)], "peer")
    order = [points[1], points[0], *points[2:]]
    table = frontier_table(order)
    assert table.header == ["file", "series", "MB", "KL (nats)", "frontier"]
    assert [row[-1] for row in table.rows] == ["yes", "", "", "yes"]
    assert table.rows[1] == ["55 MB", "trained", "55.00", "0.5000", ""]


def test_what_equals_the_teacher_is_drawn_at_the_lowest_kl():
    """A log axis has no zero, and rounding may bring a KL below it; the text says what it is."""
    (series,) = drawn_series(make_points([(100, 0.0), (110, -1e-9)]))
    assert [mark.y for mark in series.marks] == [LEAST_KL] * 2
    assert "KL: -1e-09 nats" in series.marks[1].lines


def test_the_report_is_written_whole_and_names_are_no_markup(tmp_path):
    """Four files; the page asks for nothing outside; any text may be a label."""
    points = make_points([(65, 0.2), (45, 1.0), (55, 0.5)], predicted_kl_nats=0.5, note=NASTY)
    points = [*points[:2], *make_points([(55, 0.5)], NASTY, predicted_kl_nats=0.4)]
    made = write_frontier(points, tmp_path / "out", title=NASTY, about=f"About {NASTY}")
    assert [point.file_bytes // 10**6 for point in read_points(made.points)] == [45, 65, 55]
    assert made.plot.read_bytes().startswith(b"\x89PNG")
    page, text = made.page.read_text(), made.markdown.read_text()
    assert page.count("<script>") == 1
    assert page.count("&lt;script&gt;alert(") >= 6
    assert not any(word in page for word in ("http:", "https:", "<link", "src=", "@import", "url("))
    assert made.rank_correlation == 0.0
    assert "Rank correlation of predicted and measured KL: 0.000 over 3 files." in page
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.replace("\\|", "").count("|") for row in rows] == [8] * (2 + 3)
    with pytest.raises(ValueError, match="one measured file"):
        write_frontier([], tmp_path / "none", title="none")
