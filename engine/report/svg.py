"""Line charts as inline SVG. Colours and type come from the page's style sheet, so they follow light and dark."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from regraft.engine.report.formats import compact
from regraft.engine.report.markup import Markup, el
from regraft.engine.report.scale import Point, Scale, ceiling, thin, ticks

HOVER_COLUMNS = 48


@dataclass(frozen=True)
class Line:
    """One curve. `style`: CSS class (c1 ... c4, faint). `dots`: a mark at every point, for few of them."""

    name: str
    points: Sequence[Point]
    style: str = "c1"
    dots: bool = False


def svg(width: float, height: float, title: str, *children: Markup | Sequence[Markup] | None, class_: str = "") -> Markup:
    """An SVG that scales with its column and says to a screen reader what it shows."""
    return el(
        "svg", *children, class_=class_ or None, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=title,
        style=f"max-width:{width * 1.5:g}px",
    )  # fmt: skip


def path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """Path data through the points, a tenth of a unit exact: 'M40,10 L60,12.5'."""
    return " ".join(f"{'L' if i else 'M'}{place(x(a))},{place(y(b))}" for i, (a, b) in enumerate(points))


def place(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    written: Callable[[float], str] = compact,
    size: tuple[float, float] = (440, 240),
    floor: float | None = 0.0,
    best: Point | None = None,
    notches: Sequence[float] = (),
) -> Markup | None:
    """Curves over steps, or None when no line has a point.

    `written` prints the y axis; `floor` is where it starts, None for near the lowest value; `best` gets a ring and
    a line down; `notches` are steps marked at the x axis.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    width, height = size
    xs, ys = ([p[i] for line in lines for p in line.points] for i in (0, 1))
    low, high = _domain(ys, floor)
    levels = ticks(low, high, 4 if height > 200 else 3)
    left = 14 + 7 * max(len(written(v)) for v in levels)
    x = Scale(min(xs), max(xs), left, width - 12)
    y = Scale(low, high, height - 26, 10)
    drawn: list[Markup | None] = [*_y_axis(levels, y, x, written), *_x_axis(x, height, width)]
    drawn += [el("line", x1=place(x(n)), x2=place(x(n)), y1=place(y.start - 5), y2=place(y.start), class_="notch") for n in notches]
    if best:
        bx, by = place(x(best[0])), place(y(best[1]))
        drawn.append(el("line", x1=bx, x2=bx, y1=by, y2=place(y.start), class_="best-line"))
    for line in lines:
        drawn += _curve(line, x, y)
    if best:
        drawn.append(el("circle", cx=bx, cy=by, r=6, class_="best"))
    drawn += _hover(lines, x, y, written)
    return svg(width, height, title, drawn)


def _domain(values: Sequence[float], floor: float | None) -> tuple[float, float]:
    low, high = (min(values), ceiling(values)) if floor is not None else (min(values), max(values))
    if floor is not None and low >= floor:
        return floor, high * 1.05 if high > floor else floor + 1
    margin = (high - low) * 0.12 or abs(high) * 0.05 or 0.5
    return low - margin, high + margin


def _y_axis(levels: Sequence[float], y: Scale, x: Scale, written: Callable[[float], str]) -> list[Markup]:
    drawn = []
    for level in levels:
        at = place(y(level))
        drawn.append(el("line", x1=place(x.start), x2=place(x.end), y1=at, y2=at, class_="grid"))
        drawn.append(el("text", written(level), x=place(x.start - 7), y=at, dy="0.33em", text_anchor="end"))
    return drawn


def _x_axis(x: Scale, height: float, width: float) -> list[Markup]:
    levels = [v for v in ticks(x.low, x.high, 5 if width > 380 else 4) if v == int(v)]
    return [
        el("text", compact(level), x=place(x(level)), y=height - 8, text_anchor="end" if x(level) > x.end - 10 else "middle")
        for level in levels
    ]


def _curve(line: Line, x: Scale, y: Scale) -> list[Markup]:
    shown = thin(line.points)
    drawn = [el("path", d=path(shown, x, y), class_=f"line {line.style}")] if len(shown) > 1 else []
    if line.dots or len(shown) == 1:
        small = 3 if len(shown) <= 40 else 1.6
        drawn += [el("circle", cx=place(x(a)), cy=place(y(b)), r=small, class_=f"dot {line.style}") for a, b in shown]
    return drawn


def _hover(lines: Sequence[Line], x: Scale, y: Scale, written: Callable[[float], str]) -> list[Markup]:
    """Invisible columns whose native tooltip gives the figures there: no script needed."""
    named = [line for line in lines if line.style != "faint"]
    steps = sorted({p[0] for line in named for p in line.points})
    steps = steps if len(steps) <= HOVER_COLUMNS else [steps[i * (len(steps) - 1) // (HOVER_COLUMNS - 1)] for i in range(HOVER_COLUMNS)]
    columns = []
    for i, step in enumerate(steps):
        start = x.start if i == 0 else (x(steps[i - 1]) + x(step)) / 2
        end = x.end if i == len(steps) - 1 else (x(step) + x(steps[i + 1])) / 2
        figures = [f"{line.name}: {written(_nearest(line.points, step)[1])}" for line in named]
        tip = el("title", "\n".join([f"step {step:,.0f}", *figures]))
        columns.append(
            el("rect", tip, x=place(start), y=place(y.end), width=place(end - start), height=place(y.start - y.end), class_="hover")
        )
    return columns


def _nearest(points: Sequence[Point], step: float) -> Point:
    i = bisect.bisect_left(points, step, key=lambda p: p[0])
    return min(points[max(i - 1, 0) : i + 1], key=lambda p: abs(p[0] - step))
