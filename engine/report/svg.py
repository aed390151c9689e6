"""The few SVG shapes the charts are made of. Colours and type come from the page's style sheet, so they follow light
and dark; positions are in SVG units, a tenth exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regraft.engine.report.markup import Markup, el
from regraft.engine.report.scale import Point, Scale


def svg(width: float, height: float, title: str, *children: Any, class_: str | None = None) -> Markup:
    """A drawing that scales with its column and says to a screen reader what it shows."""
    most = f"max-width:{1.2 * width:.0f}px"
    box = f"0 0 {place(width)} {place(height)}"
    return el("svg", *children, class_=class_, viewBox=box, role="img", aria_label=title, style=most)


def place(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """Path data through the points: 'M40,10 L60,12.5'."""
    return " ".join(f"{'L' if i else 'M'}{place(x(a))},{place(y(b))}" for i, (a, b) in enumerate(points))


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return el("line", x1=place(x1), y1=place(y1), x2=place(x2), y2=place(y2), class_=class_)


def circle(x: float, y: float, radius: float, class_: str) -> Markup:
    return el("circle", cx=place(x), cy=place(y), r=place(radius), class_=class_)


def rect(x: float, y: float, width: float, height: float, class_: str, tip: str | None = None, **more: Any) -> Markup:
    """`tip`: shown by the browser when pointed at; no script needed."""
    title = el("title", tip) if tip else None
    return el("rect", title, x=place(x), y=place(y), width=place(width), height=place(height), class_=class_, **more)


def label(words: str, x: float, y: float, anchor: str = "middle", **more: Any) -> Markup:
    """Text whose middle height is at y."""
    return el("text", words, x=place(x), y=place(y), dy="0.34em", text_anchor=anchor, **more)
