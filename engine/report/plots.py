"""Confusion matrix, reliability diagram, scatter of a regression: inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regraft.engine.report.formats import clip, compact, count, percent, width
from regraft.engine.report.markup import Markup, el
from regraft.engine.report.scale import Scale, finite, ticks
from regraft.engine.report.svg import place, svg

NUMBERED = 20  # classes up to which the cells of a confusion matrix hold numbers
NAMED = 30  # classes up to which its rows and columns are named
DRAWN = 200  # classes up to which it is drawn at all
BINS = 10


def heat_map(labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> Markup | None:
    """Rows: the true class; columns: the predicted one; shade: share of the row. None beyond `DRAWN` classes."""
    n = len(labels)
    if not n or n > DRAWN:
        return None
    named = n <= NAMED
    cell = max(420 / n, 2) if not named else min(46.0, max(21.0, 400 / n))
    names = [clip(name, 22) for name in labels]
    reach = 7.0 * max(width(name) for name in names) + 10 if named else 0.0
    left, top = (reach, reach * 0.72 + 6) if named else (0.0, 0.0)
    side = cell * n
    drawn = [el("rect", x=place(left), y=place(top), width=place(side), height=place(side), class_="frame")]
    if named:
        for i, (name, full) in enumerate(zip(names, labels, strict=True)):
            middle = (i + 0.5) * cell
            tip = el("title", full) if name != full else None
            drawn.append(el("text", tip, name, x=place(left - 7), y=place(top + middle), dy="0.33em", text_anchor="end"))
            at = f"translate({place(left + middle - 1)} {place(top - 7)}) rotate(-45)"
            drawn.append(el("text", tip, name, transform=at, dy="0.33em"))
    for i, row in enumerate(matrix):
        total = sum(row)
        for j, rows in enumerate(row):
            if rows:
                drawn += _cell(left + j * cell, top + i * cell, cell, rows, rows / total, labels[i], labels[j], n)
    return svg(left + side + (reach * 0.72 if named else 1), top + side + 1, "Confusion matrix", drawn, class_="matrix")


def _cell(x: float, y: float, side: float, rows: int, share: float, true: str, predicted: str, n: int) -> list[Markup]:
    right = true == predicted
    # Mistakes are small shares; the root makes one in fifty visible without drowning one in two.
    strength = 0.08 + 0.87 * (share if right else share**0.6)
    tip = f"{true}: {rows:,} rows right ({percent(share)})" if right else f"{true} taken for {predicted}: {rows:,} rows ({percent(share)})"
    gap = 1.0 if side > 12 else 0.0
    drawn = [
        el(
            "rect", el("title", tip), x=place(x + gap), y=place(y + gap), width=place(side - gap), height=place(side - gap),
            class_="right" if right else "wrong", fill_opacity=f"{strength:.2f}",
        )  # fmt: skip
    ]
    if n <= NUMBERED:
        tone = "on-strong" if strength > 0.55 else "on-weak"
        drawn.append(
            el("text", compact(rows), x=place(x + side / 2 + gap / 2), y=place(y + side / 2), dy="0.35em", text_anchor="middle", class_=tone)
        )
    return drawn


def most_confused(labels: Sequence[str], matrix: Sequence[Sequence[int]], most: int = 20) -> list[tuple[str, str, int, float]]:
    """True class, predicted class, rows, share of the true class's rows; most rows first."""
    pairs = [
        (rows, labels[i], labels[j], rows / sum(row)) for i, row in enumerate(matrix) for j, rows in enumerate(row) if rows and i != j
    ]
    pairs.sort(key=lambda p: (-p[0], -p[3]))
    return [(true, predicted, rows, share) for rows, true, predicted, share in pairs[:most]]


def reliability(bins: Sequence[Mapping[str, Any]]) -> Markup | None:
    """How often the model is right (bars) where it is how sure (x); the diagonal is perfect, the gap what is off.

    Below, the rows of each bin. Bins as `Metrics.details()["calibration"]`; empty ones are absent.
    """
    if not bins:
        return None
    x, y = Scale(0, 1, 46, 426), Scale(0, 1, 262, 12)
    most = max(b["rows"] for b in bins)
    strip = Scale(0, most, 346, 302)
    step = (x.end - x.start) / BINS
    drawn: list[Markup] = []
    for level in (0, 0.25, 0.5, 0.75, 1):
        at = place(y(level))
        drawn.append(el("line", x1=46, x2=426, y1=at, y2=at, class_="grid"))
        drawn.append(el("text", percent(level, unit="%").replace(".0", ""), x=39, y=at, dy="0.33em", text_anchor="end"))
    for tenth in range(0, 11, 2):
        drawn.append(el("text", f"{tenth * 10}%", x=place(x(tenth / 10)), y=281, text_anchor="middle" if tenth < 10 else "end"))
    for b in bins:
        start = x.start + step * min(int(b["confidence"] * BINS + 1e-9), BINS - 1)
        sure, right = b["confidence"], b["accuracy"]
        tip = el("title", f"sure {percent(sure)}, right {percent(right)}, {b['rows']:,} rows")
        column = {"x": place(start + 2), "width": place(step - 4)}
        drawn.append(el("rect", tip, y=place(y(right)), height=place(y.start - y(right)), class_="bar", **column))
        upper, lower = y(max(sure, right)), y(min(sure, right))
        drawn.append(el("rect", tip, y=place(upper), height=place(lower - upper), class_="gap", **column))
        drawn.append(el("rect", tip, y=place(strip(b["rows"])), height=place(max(346 - strip(b["rows"]), 1)), class_="rows", **column))
        middle = place(start + step / 2)
        drawn.append(el("text", compact(b["rows"]), x=middle, y=361, text_anchor="middle", class_="small"))
    drawn.append(el("line", x1=place(x(0)), y1=place(y(0)), x2=place(x(1)), y2=place(y(1)), class_="ideal"))
    drawn.append(el("text", "rows", x=39, y=361, text_anchor="end", class_="small"))
    return svg(440, 368, "Reliability diagram", drawn)


def scatter(points: Sequence[Sequence[float]]) -> Markup | None:
    """True value (x) against predicted value (y) on the same scale; the diagonal is perfect."""
    pairs = finite([(p[0], p[1]) for p in points])
    if not pairs:
        return None
    values = [v for pair in pairs for v in pair]
    margin = (max(values) - min(values)) * 0.04 or 0.5
    low, high = min(values) - margin, max(values) + margin
    levels = ticks(low, high, 5)
    left = 14 + 7 * max(len(compact(v)) for v in levels)
    x, y = Scale(low, high, left, 430), Scale(low, high, 400, 10)
    drawn: list[Markup] = []
    for level in levels:
        across, down = place(x(level)), place(y(level))
        drawn.append(el("line", x1=left, x2=430, y1=down, y2=down, class_="grid"))
        drawn.append(el("line", x1=across, x2=across, y1=10, y2=400, class_="grid"))
        drawn.append(el("text", compact(level), x=left - 7, y=down, dy="0.33em", text_anchor="end"))
        drawn.append(el("text", compact(level), x=across, y=418, text_anchor="middle"))
    drawn.append(el("line", x1=left, y1=400, x2=430, y2=10, class_="ideal"))
    drawn += [el("circle", cx=place(x(t)), cy=place(y(p)), r=2.6, class_="point") for t, p in pairs]
    return svg(440, 424, f"Predicted against true value, {count(len(pairs))} rows", drawn)
