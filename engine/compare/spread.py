"""Every way's figure with its spread, one below the other: what is ahead, and what overlaps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from regraft.engine.compare.results import Result
from regraft.engine.figures import figure
from regraft.engine.report.markup import Markup
from regraft.engine.report.scale import Scale, ticks
from regraft.engine.report.svg import circle, label, line, rect, svg

ROW, WIDTH = 24, 620  # SVG units
LETTER = 6.4  # about the width of one


def spread_chart(results: Sequence[Result], metric: str) -> Markup | None:
    """A dot at each mean, a bar of one standard deviation to either side, a faint dot for each seed; None without any."""
    measured = [r for r in results if r.complete]
    if not measured:
        return None
    values = [v for r in measured for v in r.values(metric)]
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or 0.05
    left = 10 + LETTER * max(len(r.title) for r in measured)
    x = Scale(low - margin, high + margin, left, WIDTH - 12)
    bottom = ROW * len(measured) + 8
    drawn: list[Markup] = []
    for level in ticks(x.low, x.high, 5):
        drawn += [line(x(level), 4, x(level), bottom, "grid"), label(f"{level:g}", x(level), bottom + 12)]
    for number, result in enumerate(measured):
        y = ROW * number + ROW / 2 + 4
        mean, spread = result.mean(metric), result.spread(metric)
        drawn.append(label(result.title, left - 8, y, "end"))
        if not math.isnan(spread):
            drawn.append(line(x(mean - spread), y, x(mean + spread), y, "line c1"))
        drawn += [circle(x(value), y, 2, "dot faint") for value in result.values(metric)]
        drawn.append(circle(x(mean), y, 4, "dot c1"))
        told = f"{result.title}: {figure(mean)}" + ("" if math.isnan(spread) else f" ± {figure(spread)}")
        drawn.append(rect(left, y - ROW / 2, x.end - left, ROW, "hover", told))
    return svg(WIDTH, bottom + 24, f"{metric} of every way, with its spread", drawn)
