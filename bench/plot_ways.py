"""A `regraft compare` as a picture: every way's figure with its spread, and learning curves beside it."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

INK, SOFT, GRID, MAIN = "#1f2937", "#6b7280", "#e5e7eb", "#0f766e"
CURVES = ("#0f766e", "#b45309", "#4338ca", "#be185d")  # as many as can be told apart; the other ways are grey
OTHERS = "#c3c8d0"


def draw_ways(result: dict[str, Any], picture: Path, plt: Any) -> None:
    """`result`: compare.json as the command writes it."""
    metric = result["metric"]
    ways = [way for way in result["ways"] if values(way, metric, 1.0)]
    ways.sort(key=lambda way: -statistics.fmean(values(way, metric, 1.0)))
    height = 0.34 * len(ways) + 1.5
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, height), width_ratios=[1, 1])
    _spread(left, ways, metric)
    _curves(right, ways, metric)
    rows = f"{result['training_rows']:,} training rows, measured on {result['measured_on']}"
    figure.suptitle(f"{metric.replace('_', ' ')}, {rows}", x=0.02, ha="left", fontsize=11, fontweight="bold")
    figure.text(0.02, 0.02, f"`regraft compare` within {result['budget']}", fontsize=8.5, color=SOFT)
    figure.tight_layout(rect=(0.01, 0.05, 0.99, 0.97))
    figure.savefig(picture, dpi=200, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def values(way: dict[str, Any], metric: str, share: float) -> list[float]:
    return [p["metrics"][metric] for p in way["points"] if p["share"] == share and metric in p["metrics"]]


def _spread(axis: Any, ways: list[dict[str, Any]], metric: str) -> None:
    for place, way in enumerate(ways):
        found = values(way, metric, 1.0)
        mean = statistics.fmean(found)
        if len(found) > 1:
            spread = statistics.stdev(found)
            axis.plot([mean - spread, mean + spread], [place, place], color=MAIN, linewidth=1.6)
        axis.scatter([mean], [place], s=26, color=MAIN, zorder=3)
        seconds = statistics.median(p["train_seconds"] for p in way["points"] if p["share"] == 1.0)
        axis.annotate(f"{mean:.3f}, {seconds:.1f} s", (mean, place), (6, 5), textcoords="offset points", fontsize=7.5)
    axis.set_yticks(range(len(ways)), [way["title"] for way in ways], fontsize=9)
    axis.set_ylim(len(ways) - 0.5, -0.6)
    axis.margins(x=0.22)
    axis.set_title("all rows: mean, one standard deviation, seconds of training", fontsize=9, color=INK)
    _tidy(axis)


def _curves(axis: Any, ways: list[dict[str, Any]], metric: str) -> None:
    several = [way for way in ways if len({p["share"] for p in way["points"]}) > 1]
    for number, way in enumerate(several):
        shares = sorted({p["share"] for p in way["points"]})
        rows = [statistics.median(p["rows"] for p in way["points"] if p["share"] == s) for s in shares]
        means = [statistics.fmean(values(way, metric, s)) for s in shares]
        named = number < len(CURVES)
        axis.plot(
            rows,
            means,
            marker="o",
            markersize=3.5,
            linewidth=1.4,
            color=CURVES[number] if named else OTHERS,
            label=way["title"] if named else None,
            zorder=3 if named else 2,
        )
    axis.set_xscale("log")
    shown = sorted({round(statistics.median(p["rows"] for p in points)) for points in _by_share(several)})
    axis.set_xticks(shown, [f"{rows:,}" for rows in shown])
    axis.minorticks_off()
    axis.set_title("over training rows, the best four in colour", fontsize=9, color=INK)
    if several:
        # Below the curves: within, it hid one.
        axis.legend(fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncol=2)
    _tidy(axis)


def _by_share(ways: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The points of all ways, together where their share of the rows is the same."""
    points = [point for way in ways for point in way["points"]]
    return [[p for p in points if p["share"] == share] for share in sorted({p["share"] for p in points})]


def _tidy(axis: Any) -> None:
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(length=0, labelsize=9)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
