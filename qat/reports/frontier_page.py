"""A plot of series as one HTML page: SVG made here, values on hover and focus, the table below.

The page asks for no other file and forbids itself to; without JavaScript the browser shows each
point's `<title>` on hover and the table is all there.
"""

import html
import math
from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple

from qat.reports.compare import Table, html_table

WIDTH, HEIGHT = 960, 520
LEFT, RIGHT, TOP, BOTTOM = 76, 20, 16, 56  # margins around the plot
RADIUS = 5.5
LEAST_DECADES = 0.35  # of the vertical axis: a factor of 2.2, so that a tick lies inside
LEAST_SPAN = 1e-6  # of sizes, as a share: less is one size
STEPS = (1, 2, 5)  # of tick values, times a power of ten


class Mark(NamedTuple):
    """A point of a plot."""

    x: float
    y: float
    """Above zero: the axis is logarithmic."""
    lines: list[str]
    """What it tells: a title, then `name: value` a line."""


class Series(NamedTuple):
    """Points that a line joins."""

    name: str
    marks: list[Mark]
    predicted: list[tuple[float, float]]
    """A dashed line, where there is one."""


class Frame(NamedTuple):
    """The part of the axes that is shown."""

    left: float
    right: float
    bottom: float
    top: float
    """Exponents of ten, as is bottom."""

    def x(self, value: float) -> float:
        """Return where a value of the horizontal axis lies."""
        share = (value - self.left) / (self.right - self.left)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 2)

    def y(self, value: float) -> float:
        """Return where a value of the vertical axis lies."""
        share = (math.log10(value) - self.bottom) / (self.top - self.bottom)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 2)


def marks() -> list[tuple[str, str, str]]:
    """Return color, SVG path and matplotlib marker of each series; colors are 3:1 on white."""
    r = RADIUS
    circle = f"M{-r} 0a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    square = f"M{-r} {-r}h{2 * r}v{2 * r}h{-2 * r}z"
    diamond = f"M0 {-1.4 * r}L{1.4 * r} 0L0 {1.4 * r}L{-1.4 * r} 0z"
    triangle = f"M0 {-1.3 * r}L{1.3 * r} {r}H{-1.3 * r}z"
    return [
        ("#0b66c3", circle, "o"),
        ("#c2410c", square, "s"),
        ("#0f7b4f", diamond, "D"),
        ("#8b3fb8", triangle, "^"),
        ("#7a5c00", circle, "o"),
        ("#4b5563", square, "s"),
    ]


def as_page(
    title: str, about: Sequence[str], series: Sequence[Series], axes: tuple[str, str], table: Table
) -> str:
    """Return the page; every text may hold any sign.

    Args:
        title: Its heading.
        about: Paragraphs under it.
        series: What is drawn.
        axes: Names of the horizontal and the vertical one.
        table: Its rows are the points in the order drawn.
    """
    name = html.escape(title)
    paragraphs = "\n".join(f"<p>{html.escape(text)}</p>" for text in about)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<style>{STYLE}</style></head>
<body><main>
<h1>{name}</h1>
{paragraphs}
<figure>
{legend(series)}
<div id="plot">{svg(name, series, axes)}<div id="tip" role="tooltip" hidden></div></div>
<figcaption>Lower left is better. Hover over a point, or move to it with Tab, for its numbers.
</figcaption></figure>
<h2>All files</h2>
<div class="scroll">{html_table(table)}</div>
</main>
<script>{SCRIPT}</script></body></html>
"""


def legend(series: Sequence[Series]) -> str:
    """Return what each mark stands for."""
    items = [
        f'<li><svg viewBox="-9 -9 18 18" aria-hidden="true"><path d="{path}" fill="{color}"/></svg>'
        f"{html.escape(one.name)}</li>"
        for one, (color, path, _) in zip(series, cycle(marks()), strict=False)
    ]
    if any(one.predicted for one in series):
        line = '<path d="M-9 0H9" class="predicted" stroke="currentColor"/>'
        items.append(
            f'<li><svg viewBox="-9 -9 18 18" aria-hidden="true">{line}</svg>predicted</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def svg(name: str, series: Sequence[Series], axes: tuple[str, str]) -> str:
    """Return the plot; `name` is escaped already."""
    frame = frame_of(series)
    parts = [grid(frame, axes)]
    for one, (color, path, _) in zip(series, cycle(marks()), strict=False):
        line = [(mark.x, mark.y) for mark in one.marks]
        parts.append(f'<g class="series" fill="{color}" stroke="{color}">')
        parts += [f'<path class="predicted" d="{polyline(frame, one.predicted)}"/>'] * bool(
            one.predicted
        )
        parts += [f'<path class="line" d="{polyline(frame, line)}"/>']
        parts += [point(frame, mark, path) for mark in one.marks]
        parts.append("</g>")
    body = "\n".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{name}">\n{body}\n</svg>'


def polyline(frame: Frame, points: Sequence[tuple[float, float]]) -> str:
    """Return a path through points."""
    return "M" + "L".join(f"{frame.x(x)} {frame.y(y)}" for x, y in points)


def point(frame: Frame, mark: Mark, path: str) -> str:
    """Return a mark that can be hovered over and focused, with a larger circle to be hit by."""
    told = html.escape("\n".join(mark.lines))
    place = f'transform="translate({frame.x(mark.x)} {frame.y(mark.y)})"'
    return (
        f'<g class="point" tabindex="0" role="img" {place}><title>{told}</title>'
        f'<circle r="13" class="target"/><path d="{path}"/></g>'
    )


def frame_of(series: Sequence[Series]) -> Frame:
    """Return the axes that hold every point, with some room around."""
    points = [(m.x, m.y) for one in series for m in one.marks]
    points += [pair for one in series for pair in one.predicted]
    across, up = [x for x, _ in points], [math.log10(y) for _, y in points]
    span = max(across) - min(across)
    beside = 0.05 * span if span > LEAST_SPAN * max(across) else 0.1 * max(across)
    above = max(0.06 * (max(up) - min(up)), (LEAST_DECADES - max(up) + min(up)) / 2)
    return Frame(min(across) - beside, max(across) + beside, min(up) - above, max(up) + above)


def grid(frame: Frame, axes: tuple[str, str]) -> str:
    """Return lines at round values, their numbers and the names of the axes."""
    low, right, middle = HEIGHT - BOTTOM, WIDTH - RIGHT, (TOP + HEIGHT - BOTTOM) / 2
    lines = [
        f'<path d="M{LEFT} {y}H{right}"/><text x="{LEFT - 10}" y="{y + 4}">{value:g}</text>'
        for value, y in ((value, frame.y(value)) for value in log_ticks(frame.bottom, frame.top))
    ]
    below = [
        f'<path d="M{x} {TOP}V{low}"/><text x="{x}" y="{low + 22}">{value:g}</text>'
        for value, x in ((value, frame.x(value)) for value in ticks(frame.left, frame.right))
    ]
    return (
        f'<g class="grid">{"".join(lines)}<g class="below">{"".join(below)}'
        f'<text class="name" x="{(LEFT + right) / 2}" y="{HEIGHT - 10}">{axes[0]}</text>'
        f'<text class="name" transform="translate(16 {middle}) rotate(-90)">{axes[1]}</text>'
        "</g></g>"
    )


def ticks(least: float, most: float) -> list[float]:
    """Return 4 to 10 round values between two, evenly spaced."""
    rough = (most - least) / 8
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(step for step in (*STEPS, 10) if step * power >= rough)
    first = math.ceil(least / step)
    values = [index * step for index in range(first, math.floor(most / step) + 1)]
    return [value for value in values if least <= value <= most]  # products round


def log_ticks(least: float, most: float) -> list[float]:
    """Return round values between two powers of ten: 1, 2 and 5 of each decade, 1 of many."""
    steps = STEPS if most - least < 3 else STEPS[:1]
    if most - least < math.log10(STEPS[-1]):  # could fall between two of these
        steps = tuple(range(1, 10))
    decades = range(math.floor(least), math.ceil(most) + 1)
    values = [float(f"{step}e{decade}") for decade in decades for step in steps]
    return [value for value in values if least <= math.log10(value) <= most]


POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light; --ink: #17202a; --soft: #5b6672; --rule: #e3e7ec; --sheet: #fff; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7f9; color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0; max-width: 48rem; color: var(--soft); }
figure, .scroll { background: var(--sheet); border: 1px solid var(--rule); border-radius: 12px;
  box-shadow: 0 1px 3px #17202a0f; }
figure { margin: 1.4rem 0 0; padding: 1.1rem 1.1rem .9rem; }
figcaption { color: var(--soft); font-size: .85rem; padding-left: .3rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: 0 0 .5rem;
  padding: 0 .3rem; font-size: .92rem; }
.legend li { display: flex; align-items: center; gap: .45rem; }
.legend svg { width: 18px; height: 18px; }
#plot { position: relative; }
#plot > svg { display: block; width: 100%; height: auto; }
.grid path { stroke: var(--rule); }
.grid text { fill: var(--soft); font-size: 13px; text-anchor: end; }
.grid .below text { text-anchor: middle; }
.grid text.name { fill: var(--ink); font-size: 14px; }
.line { fill: none; stroke-width: 2.25; stroke-linejoin: round; }
.predicted { fill: none; stroke-width: 1.75; stroke-dasharray: 5 5; opacity: .55; }
.point { cursor: pointer; outline: none; stroke: #fff; stroke-width: 1.5; }
.point .target { fill: #fff; fill-opacity: 0; stroke: none; }
.point.shown .target { fill: currentColor; fill-opacity: .12; stroke: var(--ink); }
#tip { position: absolute; z-index: 1; width: max-content; max-width: min(24rem, 100%);
  padding: .65rem .85rem; border-radius: 9px; background: #17202af5; color: #fff;
  font-size: .86rem; line-height: 1.45; pointer-events: none; box-shadow: 0 6px 20px #17202a40; }
#tip[hidden] { display: none; }
#tip b { display: block; font-size: .95rem; margin-bottom: .25rem; overflow-wrap: anywhere; }
#tip dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .9rem; margin: 0; }
#tip dt { color: #b9c3cf; }
#tip dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .5rem .7rem; text-align: right; vertical-align: top;
  font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--rule); }
th { white-space: nowrap; }
tr + tr td { border-top: 1px solid var(--rule); }
th:nth-child(-n+2), td:nth-child(-n+2), th:last-child, td:last-child { text-align: left; }
td:first-child { font-weight: 600; }
td:nth-child(2) { min-width: 9.5rem; }
td:last-child { min-width: 14rem; color: var(--soft); font-size: .84rem; }
tr.shown td { background: #eef4fb; }
@media (prefers-reduced-motion: no-preference) { tr td { transition: background .15s; } }
"""
# The nearest point within REACH pixels is shown, so that neighbours that overlap can be told apart.
SCRIPT = """
"use strict";
const REACH = 40;
const plot = document.getElementById("plot"), tip = document.getElementById("tip");
const points = [...plot.querySelectorAll(".point")];
const rows = [...document.querySelectorAll("table tr")].slice(1);
const texts = points.map(point => {
  const title = point.querySelector("title"), lines = title.textContent.split("\\n");
  point.setAttribute("aria-label", lines.join(", "));
  title.remove();
  return lines;
});
let shown = -1;
function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}
function show(index) {
  if (index === shown) return;
  for (const list of [points, rows]) {
    list[shown]?.classList.remove("shown");
    list[index]?.classList.add("shown");
  }
  shown = index;
  tip.hidden = index < 0;
  if (index < 0) return;
  const [head, ...rest] = texts[index], values = document.createElement("dl");
  for (const line of rest) {
    const cut = line.indexOf(": ");
    values.append(element("dt", line.slice(0, cut)), element("dd", line.slice(cut + 2)));
  }
  tip.replaceChildren(element("b", head), values);
  place(center(index));
}
function center(index) {
  const box = points[index].querySelector(".target").getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
}
function place([x, y]) {
  const box = plot.getBoundingClientRect(), gap = 16;
  const left = Math.max(0, Math.min(x - box.x + gap, box.width - tip.offsetWidth));
  const isMoved = x - box.x + gap > left, height = tip.offsetHeight;
  const top = isMoved ? y - box.y - height - gap : y - box.y - height / 2;
  const least = Math.max(0, Math.min(top, box.height - height));
  tip.style.left = left + "px";
  tip.style.top = (isMoved && top < 0 ? y - box.y + gap : least) + "px";
}
function focused() { return points.indexOf(document.activeElement); }
plot.addEventListener("pointermove", event => {
  const far = points.map((_, index) => {
    const [x, y] = center(index);
    return Math.hypot(event.clientX - x, event.clientY - y);
  });
  const least = Math.min(...far);
  show(least <= REACH ? far.indexOf(least) : focused());
});
plot.addEventListener("pointerleave", () => show(focused()));
points.forEach((point, index) => {
  point.addEventListener("focus", () => show(index));
  point.addEventListener("blur", () => show(-1));
});
document.addEventListener("keydown", event => { if (event.key === "Escape") show(-1); });
"""
