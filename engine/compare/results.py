"""What the ways achieved: means with spread, and whether two of them can be told apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SURE = 2.0  # standard errors


@dataclass
class Result:
    """One way's points, as its worker told them. `why`: why there are none, else ''."""

    name: str
    title: str
    points: list[dict[str, Any]] = field(default_factory=list)
    memory_mb: float = 0.0
    why: str = ""

    def values(self, metric: str, share: float = 1.0) -> list[float]:
        return [p["metrics"][metric] for p in self.points if p["share"] == share and metric in p["metrics"]]

    def mean(self, metric: str, share: float = 1.0) -> float:
        found = self.values(metric, share)
        return statistics.fmean(found) if found else math.nan

    def spread(self, metric: str, share: float = 1.0) -> float:
        """Standard deviation over seeds; nan for fewer than two."""
        found = self.values(metric, share)
        return statistics.stdev(found) if len(found) > 1 else math.nan

    def median(self, key: str, share: float = 1.0) -> float:
        found = [p[key] for p in self.points if p["share"] == share]
        return statistics.median(found) if found else math.nan

    @property
    def complete(self) -> bool:
        """Whether it was measured on all rows at least once."""
        return any(p["share"] == 1.0 for p in self.points)


def error_of_difference(a: Result, b: Result, metric: str) -> float:
    """Standard error of the difference of two means: the spread over seeds, and what so few held-out rows can tell.

    For a share p of n rows the latter is sqrt(p (1 - p) / n): both ways answer the same rows, and are taken to be
    half correlated. Other figures have the spread over seeds alone.
    """
    variance = 0.0
    for result in (a, b):
        found = result.values(metric)
        if len(found) > 1:
            variance += statistics.variance(found) / len(found)
    p = (a.mean(metric) + b.mean(metric)) / 2
    rows = a.median("held")
    if 0 <= p <= 1 and metric not in ("loss", "mse", "mae"):
        variance += p * (1 - p) / max(rows, 1)
    return math.sqrt(variance)


def ranked(results: Sequence[Result], metric: str, greater_is_better: bool) -> list[Result]:
    """The complete ones, the best first."""
    sign = -1 if greater_is_better else 1
    return sorted((r for r in results if r.complete), key=lambda r: sign * r.mean(metric))


def advice(results: Sequence[Result], metric: str, greater_is_better: bool) -> str:
    """One sentence that follows from the figures: the cheapest way that cannot be told from the best."""
    order = ranked(results, metric, greater_is_better)
    if not order:
        return "No way was measured on all rows within the budget: give a longer one with --budget."
    best = order[0]
    level = [best]
    for other in order[1:]:
        if abs(best.mean(metric) - other.mean(metric)) <= SURE * error_of_difference(best, other, metric):
            level.append(other)
    chosen = min(level, key=lambda r: r.median("train_seconds"))
    rest = [r for r in order if r not in level]
    said = f"Use {chosen.title}: {metric} {_points(chosen, metric)}"
    if chosen is not best:
        noise = SURE * error_of_difference(best, chosen, metric)
        gap = abs(best.mean(metric) - chosen.mean(metric))
        said += (
            f"; {best.title} is {100 * gap:.1f} points ahead, which is noise on {best.median('held'):,.0f} held-out rows and "
            f"{len(best.values(metric))} seed{'s' if len(best.values(metric)) != 1 else ''} (differences below "
            f"{100 * noise:.1f} points say nothing), and takes {_times(best, chosen)} the training time"
        )
    elif rest:
        gap = abs(best.mean(metric) - rest[0].mean(metric))
        noise = SURE * error_of_difference(best, rest[0], metric)
        said += (
            f", {100 * gap:.1f} points ahead of {rest[0].title} (noise: {100 * noise:.1f} points) for "
            f"{_times(best, rest[0])} its training time"
        )
        others = [r.title for r in level if r is not chosen]
        said += f", and as good as {', '.join(others)} at the least training time" if others else ""
    else:
        said += (
            ", the only way that was measured" if len(order) == 1 else "; no way can be told from another on these rows"
        )
    return said + _hunger(chosen, metric, greater_is_better) + "."


def _points(result: Result, metric: str) -> str:
    spread = result.spread(metric)
    return f"{100 * result.mean(metric):.1f}" + ("" if math.isnan(spread) else f" ± {100 * spread:.1f}")


def _times(a: Result, b: Result) -> str:
    ratio = a.median("train_seconds") / max(b.median("train_seconds"), 1e-3)
    return f"{ratio:,.0f} times" if ratio >= 2 else f"{ratio:.1f} times"


def _hunger(result: Result, metric: str, greater_is_better: bool) -> str:
    # What four times the rows brought says what more rows would bring.
    shares = sorted({p["share"] for p in result.points})
    if len(shares) < 2:
        return ""
    gain = result.mean(metric) - result.mean(metric, shares[-2])
    gain = gain if greater_is_better else -gain
    times = shares[-1] / shares[-2]
    if gain * 100 < 1:
        return f"; more rows would bring little ({times:.0f} times the rows brought {100 * gain:+.1f} points)"
    return f"; more labelled rows would help ({times:.0f} times the rows brought {100 * gain:+.1f} points)"
