"""Line charts over optimizer steps."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from regraft.engine.report.formats import compact
from regraft.engine.report.markup import Markup, el
from regraft.engine.report.scale import Point, Scale, ceiling, thin, ticks
from regraft.engine.report.svg import circle, label, line, path, rect, svg

HOVER_COLUMNS = 48


@dataclass(frozen=True)
class Line:
    """One curve. `style`: CSS class (c1 ... c4, faint). `dots`: a mark at every point, for few of them."""

    name: str
    points: Sequence[Point]
    style: str = "c1"
    dots: bool = False


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    written: Callable[[float], str] = compact,
    size: tuple[float, float] = (440, 240),
    floor: float | None = 0.0,
    roof: float | None = None,
    until: float = 0.0,
    best: Point | None = None,
    notches: Sequence[float] = (),
) -> Markup | None:
    """Curves over steps, or None when no line has a point.

    The x axis goes from 0 to the last step, or to `until` if that is later, so that charts beside each other line up.
    `written` prints the y axis; `floor` is where it starts, None for near the lowest value; `roof` is where it ends
    at the latest; `best` gets a ring and a line down; `notches` are steps marked at the x axis.
    """
    lines = [curve for curve in lines if curve.points]
    if not lines:
        return None
    width, height = size
    xs, ys = ([p[i] for curve in lines for p in curve.points] for i in (0, 1))
    low, high = _domain(ys, floor, roof)
    levels = ticks(low, high, 4 if height > 200 else 3)
    left = 14 + 7 * max((len(written(v)) for v in levels), default=1)
    x, y = Scale(0, max(*xs, until, 1), left, width - 12), Scale(low, high, height - 26, 10)
    drawn: list[Markup] = []
    for level in levels:
        drawn += [line(x.start, y(level), x.end, y(level), "grid"), label(written(level), x.start - 7, y(level), "end")]
    for step in ticks(x.low, x.high, 5 if width > 380 else 4):
        if step == int(step):
            drawn.append(label(compact(step), x(step), height - 12, "end" if x(step) > x.end - 10 else "middle"))
    drawn += [line(x(step), y.start - 5, x(step), y.start, "notch") for step in notches]
    drawn += [line(x(best[0]), y(best[1]), x(best[0]), y.start, "best-line")] if best else []
    for curve in lines:
        drawn += _curve(curve, x, y)
    drawn += [circle(x(best[0]), y(best[1]), 6, "best")] if best else []
    return svg(width, height, title, drawn, _hover(lines, x, y, written))


def _domain(values: Sequence[float], floor: float | None, roof: float | None) -> tuple[float, float]:
    low, high = min(values), max(values)
    if floor is not None and low >= floor:
        return floor, ceiling(values) * 1.05 if high > floor else floor + 1
    margin = (high - low) * 0.12 or abs(high) * 0.05 or 0.5
    return low - margin, high + margin if roof is None else min(high + margin, max(roof, high))


def _curve(curve: Line, x: Scale, y: Scale) -> list[Markup]:
    shown = thin(curve.points)
    drawn = [el("path", d=path(shown, x, y), class_=f"line {curve.style}")] if len(shown) > 1 else []
    if curve.dots or len(shown) == 1:
        drawn += [circle(x(a), y(b), 3 if len(shown) <= 40 else 1.6, f"dot {curve.style}") for a, b in shown]
    return drawn


def _hover(lines: Sequence[Line], x: Scale, y: Scale, written: Callable[[float], str]) -> list[Markup]:
    """Invisible columns over the chart whose tips give the figures there."""
    named = [curve for curve in lines if curve.style != "faint"]
    steps = sorted({p[0] for curve in named for p in curve.points})
    if len(steps) > HOVER_COLUMNS:
        steps = [steps[i * (len(steps) - 1) // (HOVER_COLUMNS - 1)] for i in range(HOVER_COLUMNS)]
    columns = []
    for i, step in enumerate(steps):
        start = x.start if i == 0 else (x(steps[i - 1]) + x(step)) / 2
        end = x.end if i == len(steps) - 1 else (x(step) + x(steps[i + 1])) / 2
        figures = [f"{curve.name}: {written(_nearest(curve.points, step)[1])}" for curve in named]
        tip = "\n".join([f"step {step:,.0f}", *figures])
        columns.append(rect(start, y.end, end - start, y.start - y.end, "hover", tip))
    return columns


def _nearest(points: Sequence[Point], step: float) -> Point:
    i = bisect.bisect_left(points, step, key=lambda p: p[0])
    return min(points[max(i - 1, 0) : i + 1], key=lambda p: abs(p[0] - step))
