"""Reliability diagram of a classification, scatter of a regression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regraft.engine.report.formats import compact, count, percent
from regraft.engine.report.markup import Markup
from regraft.engine.report.scale import Scale, finite, ticks
from regraft.engine.report.svg import circle, label, line, rect, svg
from regraft.engine.tasks.classification import CALIBRATION_BINS


def reliability(bins: Sequence[Mapping[str, Any]]) -> Markup | None:
    """How often the model is right where it is so sure (x); the diagonal is perfect, the gap to it what is off.

    Below, the rows of each bin. Bins as `Metrics.details()["calibration"]`; empty ones are absent there.
    """
    if not bins:
        return None
    x, y = Scale(0, 1, 46, 426), Scale(0, 1, 262, 12)
    strip = Scale(0, max(b["rows"] for b in bins), 346, 302)
    drawn: list[Markup] = []
    for level in (0, 25, 50, 75, 100):
        drawn += [line(46, y(level / 100), 426, y(level / 100), "grid"), label(f"{level}%", 39, y(level / 100), "end")]
    for level in range(0, 101, 20):
        drawn.append(label(f"{level}%", x(level / 100), 277, "middle" if level < 100 else "end"))
    step = (x.end - x.start) / CALIBRATION_BINS
    for b in bins:
        sure, right, rows = b["confidence"], b["accuracy"], b["rows"]
        start = x.start + step * min(int(sure * CALIBRATION_BINS + 1e-9), CALIBRATION_BINS - 1)
        tip = f"sure {percent(sure)}, right {percent(right)}, {count(rows)} rows"
        upper, lower = y(max(sure, right)), y(min(sure, right))
        drawn.append(rect(start + 2, lower, step - 4, y.start - lower, "bar", tip))
        drawn.append(rect(start + 2, upper, step - 4, lower - upper, "gap", tip))
        drawn.append(rect(start + 2, y(right) - 1.5, step - 4, 3, "cap", tip))
        drawn.append(rect(start + 2, min(strip(rows), 345), step - 4, max(346 - strip(rows), 1), "rows", tip))
        drawn.append(label(compact(rows), start + step / 2, 357, class_="small"))
    drawn += [line(x(0), y(0), x(1), y(1), "ideal"), label("rows", 39, 357, "end", class_="small")]
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
        drawn += [line(left, y(level), 430, y(level), "grid"), label(compact(level), left - 7, y(level), "end")]
        drawn += [line(x(level), 10, x(level), 400, "grid"), label(compact(level), x(level), 414)]
    drawn.append(line(left, 400, 430, 10, "ideal"))
    drawn += [circle(x(true), y(predicted), 2.6, "point") for true, predicted in pairs]
    return svg(440, 424, f"Predicted against true value, {count(len(pairs))} rows", drawn)
