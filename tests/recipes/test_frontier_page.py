"""The frontier's page in a real browser: what a reader sees on hover and focus."""

import pytest

from qat.reports.frontier import FrontierPoint, write_frontier
from tests.browser import CONSOLE, browser_page, find_browser

pytestmark = pytest.mark.recipe

PLACES = """[...document.querySelectorAll(".point .target")].map(target => {
  const box = target.getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
})"""
TIP = "tip.hidden ? null : tip.innerText"


def make_points():
    """Return two series, of which the first has predictions, and a file that hides what it is."""
    sizes = (45, 55, 65)
    first = [
        FrontierPoint(
            series="untrained",
            label=f"{mb} MB",
            file_bytes=mb * 10**6,
            kl_nats=30 / mb,
            predicted_kl_nats=25 / mb,
            kl_p99=90 / mb,
            top1_agreement=mb / 100,
        )
        for mb in sizes
    ]
    note = "181 matrices are <b>IQ4_NL</b>"
    peer = FrontierPoint(
        series="peer", label="Q3_K_M.gguf", file_bytes=60 * 10**6, kl_nats=1.25, note=note
    )
    return [*first, peer]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Open the page of a report."""
    browser = find_browser()
    if browser is None:
        pytest.skip("no Chromium is installed; `apt-get install chromium` installs it")
    folder = tmp_path_factory.mktemp("frontier")
    made = write_frontier(make_points(), folder, title="Frontier", about="Measured on a test.")
    with browser_page(browser) as page:
        page.open(made.page)
        yield page


def test_the_table_has_all_rows(page):
    """A row a point and the header; the correlation stands above."""
    assert page.value("document.querySelectorAll('table tr').length") == 1 + len(make_points())
    assert "1.000 over 3 files" in page.value("document.body.innerText")


def test_hovering_shows_a_points_numbers(page):
    """All of them, near the pointer; nothing once it is elsewhere. Its row is marked."""
    for point, (x, y) in zip(make_points(), page.value(PLACES), strict=True):
        page.move_to(x + 4, y - 3)
        told = page.value(TIP)
        assert told.startswith(point.label)
        assert f"{point.kl_nats:.4g} nats" in told
        assert f"{point.file_bytes:,} bytes" in told
        assert point.note in told
        if point.predicted_kl_nats is not None:
            assert f"{point.predicted_kl_nats:.4g} nats" in told
            assert f"{point.kl_p99:.4g} nats" in told
            assert f"{point.top1_agreement:.1%}" in told
        marked = page.value("document.querySelector('tr.shown').innerText")
        assert f"{point.kl_nats:.4f}" in marked
        page.move_to(2, 2)
        assert page.value(TIP) is None


def test_the_keyboard_reaches_every_point(page):
    """Tab goes from point to point and shows the same; Escape hides it."""
    page.value("document.activeElement.blur()")
    for point in make_points():
        page.press("Tab")
        assert page.value(TIP).startswith(point.label)
        assert point.label in page.value("document.activeElement.getAttribute('aria-label')")
    page.press("Escape")
    assert page.value(TIP) is None


def test_the_tip_stays_inside_the_plot(page):
    """Also at the right end, on a narrow screen, where the page does not scroll sideways."""
    inside = """(() => { const a = tip.getBoundingClientRect(), b = plot.getBoundingClientRect();
      return a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1; })()"""
    for width in (1200, 420):
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        for x, y in page.value(PLACES):
            page.move_to(x, y)
            assert page.value(inside)
        assert page.value("document.documentElement.scrollWidth") <= width


def test_nothing_is_logged_and_nothing_asked_of_the_network(page, tmp_path):
    """No error, no warning; the file itself is all that was loaded."""
    assert page.events_of(*CONSOLE) == []
    asked = [event["request"]["url"] for event in page.events_of("Network.requestWillBeSent")]
    assert [url.split(":")[0] for url in asked] == ["file"]
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
