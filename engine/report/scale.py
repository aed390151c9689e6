"""Numbers to positions, and long curves to as many points as can be seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] linearly to [start, end] (SVG units); what lies outside is held at the edge."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        if self.high == self.low:
            return (self.start + self.end) / 2
        share = min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers inside [low, high], roughly `about` of them, 1, 2, 2.5 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.7)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.10g}") for k in range(first, last + 1)]


def finite(points: Sequence[tuple[Any, Any]]) -> list[Point]:
    """The points that can be drawn: both numbers there and finite."""
    return [
        (float(x), float(y))
        for x, y in points
        if isinstance(x, Real) and isinstance(y, Real) and math.isfinite(x) and math.isfinite(y)
    ]


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Mean over `window` points around each, fewer at both ends: does not lag, as a running mean would."""
    half, sums = window // 2, [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    edges = [(max(i - half, 0), min(i + half + 1, len(points))) for i in range(len(points))]
    return [(x, (sums[b] - sums[a]) / (b - a)) for (x, _), (a, b) in zip(points, edges, strict=True)]


def thin(points: Sequence[Point], most: int = 400) -> list[Point]:
    """At most about `most` points, keeping the lowest and highest of each stretch so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        low, high = min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])
        kept += [points[i] for i in sorted({low, high})]
    return kept


def ceiling(values: Sequence[float]) -> float:
    """Upper end of an axis: the highest value, unless a few spikes would flatten all the rest."""
    ranked = sorted(values)
    usual = ranked[int(0.98 * (len(ranked) - 1))]
    return ranked[-1] if ranked[-1] <= 3 * usual or usual <= 0 else 1.5 * usual
