"""What the ways achieved: means with spread, and whether two of them can be told apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SURE = 2.0  # standard errors
NEAR = 10  # times the rows
SHARES_OF_ROWS = frozenset({"accuracy", "subset_accuracy", "exact_match"})


@dataclass
class Result:
    """One way's points, as its worker told them. `why`: why there are none, else ''; `needs`: where time was what all rows
    lacked, the seconds they would take at the least. `folds`: whether the points of all rows held out other rows each, instead
    of having other seeds; `seeded`: whether another seed gives another figure."""

    name: str
    title: str
    points: list[dict[str, Any]] = field(default_factory=list)
    memory_mb: float = 0.0
    why: str = ""
    folds: bool = False
    seeded: bool = True
    needs: float | None = None

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
    def held(self) -> float:
        """How many rows its figures on all rows are of: those of all folds, or the same ones for every seed."""
        return sum(p["held"] for p in self.points if p["share"] == 1.0) if self.folds else self.median("held")

    @property
    def complete(self) -> bool:
        """Whether it was measured on all rows at least once."""
        return any(p["share"] == 1.0 for p in self.points)


def error_of_difference(a: Result, b: Result, metric: str) -> float:
    """Standard error of the difference of two means: the spread over seeds or folds, and what so few held-out rows can
    tell; nan where the figures do not say.

    For a share p of n rows the latter is sqrt(p (1 - p) / n): both ways answer the same rows, and are taken to be
    half correlated. Other figures have the spread alone, which is nothing to go by where there is but one seed.
    """
    variance = 0.0
    for result in (a, b):
        found = result.values(metric)
        if len(found) > 1:
            variance += statistics.variance(found) / len(found)
        elif metric not in SHARES_OF_ROWS and (result.seeded or result.folds):
            return math.nan
    if metric in SHARES_OF_ROWS:
        p = (a.mean(metric) + b.mean(metric)) / 2
        variance += max(0.0, p * (1 - p)) / max(min(a.held, b.held), 1)
    elif variance == 0.0:  # solved at once, whatever the seed: seeds say nothing about other rows
        return math.nan
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
    best, unit = order[0], Unit.of(order, metric, greater_is_better)

    def noise(other: Result) -> float:
        return SURE * error_of_difference(best, other, metric)

    def gap(other: Result) -> float:
        return abs(best.mean(metric) - other.mean(metric))

    level = [best, *(r for r in order[1:] if not gap(r) or gap(r) <= noise(r))]
    chosen = min(level, key=lambda r: r.median("train_seconds"))
    rest = [r for r in order if r not in level]
    said = f"Use {chosen.title}: {metric} {unit.figure(chosen, metric)}"
    if chosen is not best:
        said += f"; {best.title} is {unit.amount(gap(chosen))} ahead"
        if gap(chosen):
            said += (
                f", which is noise on {best.held:,.0f} held-out rows and {_repeats(best, metric)} (differences below "
                f"{unit.amount(noise(chosen))} say nothing)"
            )
        said += f", and takes {_times(best, chosen)} the training time"
    elif rest:
        said += f", {unit.amount(gap(rest[0]))} ahead of {rest[0].title} "
        if math.isnan(noise(rest[0])):
            said += (
                f"for {_times(best, rest[0])} its training time; whether that is noise {_untold(best, rest[0], metric)}"
            )
        else:
            said += f"(noise: {unit.amount(noise(rest[0]))}) for {_times(best, rest[0])} its training time"
        others = [r.title for r in level if r is not chosen]
        said += f", and as good as {', '.join(others)} at the least training time" if others else ""
    else:
        said += (
            ", the only way that was measured" if len(order) == 1 else "; no way can be told from another on these rows"
        )
    return said + _hunger(chosen, metric, greater_is_better, unit) + "."


@dataclass(frozen=True)
class Unit:
    """How figures are said: points of a hundred for those that lie within 1, else (errors, say) as they are."""

    points: bool

    @classmethod
    def of(cls, results: Sequence[Result], metric: str, greater_is_better: bool) -> Unit:
        return cls(greater_is_better and all(abs(r.mean(metric)) <= 1 for r in results))

    def amount(self, value: float, sign: str = "") -> str:
        return f"{100 * value:{sign}.1f} points" if self.points else f"{value:{sign}.3g}"

    def figure(self, result: Result, metric: str) -> str:
        spread = result.spread(metric)
        said = [result.mean(metric)] + ([] if math.isnan(spread) else [spread])
        return " ± ".join(f"{100 * value:.1f}" if self.points else f"{value:.4g}" for value in said)


def _repeats(result: Result, metric: str) -> str:
    count = len(result.values(metric))
    return f"{count} {'fold' if result.folds else 'seed'}{'s' if count != 1 else ''}"


def _untold(a: Result, b: Result, metric: str) -> str:
    alone = [r for r in (a, b) if len(r.values(metric)) < 2 and (r.seeded or r.folds)]
    if alone:
        return (
            f"cannot be told from one {'fold' if alone[0].folds else 'seed'} of {metric}, which is no share of rows: "
            "--seeds 3, --folds 5 or a longer --budget would tell"
        )
    return f"cannot be told from seeds that all give the same {metric}: --folds 5 would tell"


def _times(a: Result, b: Result) -> str:
    ratio = max(a.median("train_seconds"), 1e-3) / max(b.median("train_seconds"), 1e-3)
    if ratio < 0.1:
        return f"1/{float(f'{1 / ratio:.0e}'):.0f} of"
    return f"{ratio:,.0f} times" if ratio >= 2 else f"{ratio:.1f} times"


def _hunger(result: Result, metric: str, greater_is_better: bool, unit: Unit) -> str:
    # What four times the rows brought says what more rows would bring; what a hundred times did says nothing of it.
    shares = sorted({p["share"] for p in result.points})
    if len(shares) < 2 or shares[-1] > NEAR * shares[-2]:
        return ""
    fewer = result.mean(metric, shares[-2])
    change = result.mean(metric) - fewer
    gain = change if greater_is_better else -change
    brought = f"{shares[-1] / shares[-2]:.0f} times the rows brought {unit.amount(change, '+')}"
    if gain < (0.01 if unit.points else 0.01 * abs(fewer)):
        return f"; more rows would bring little ({brought})"
    return f"; more labelled rows would help ({brought})"
