"""What kernels_gpu.py measured, as a picture: how long every other contestant takes beside Regraft's kernel."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from plot_ways import GRID, INK, MAIN, SOFT

OTHERS = (("#9ca3af", "o"), ("#b45309", "s"), ("#4338ca", "D"), ("#be185d", "^"), ("#0284c7", "v"))


def draw_kernels(result: dict[str, Any], picture: Path, plt: Any) -> None:
    """`result`: kernels_gpu.json as the command writes it. A line a kernel, shape and direction."""
    groups: dict[tuple, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in result["rows"]:
        groups[row["name"], row["shape"], row["direction"]][row["who"]] = row
    beside = {key: by_who for key, by_who in groups.items() if "regraft" in by_who and len(by_who) > 1}
    everyone = dict.fromkeys(kind(who) for by_who in beside.values() for who in by_who if who != "regraft")
    marks = {who: OTHERS[min(i, len(OTHERS) - 1)] for i, who in enumerate(everyone)}
    height = 0.24 * len(beside) + 1.6
    figure, axis = plt.subplots(figsize=(11, height))
    axis.axvline(1.0, color=MAIN, linewidth=1.6, zorder=1)
    named: set[str] = set()
    for place, by_who in enumerate(beside.values()):
        ours = by_who["regraft"]
        text = f"{ours['milliseconds']:.3g} ms, {ours['share']:.0%}"
        axis.text(1.01, place, text, transform=axis.get_yaxis_transform(), va="center", fontsize=7.5, color=INK)
        for who, row in by_who.items():
            if who != "regraft":
                colour, mark = marks[kind(who)]
                label = None if kind(who) in named else kind(who)
                named.add(kind(who))
                times = row["milliseconds"] / ours["milliseconds"]
                axis.scatter([times], [place], s=26, color=colour, marker=mark, zorder=3, label=label)
    told = [f"{name}, {shape}, {direction}" for name, shape, direction in beside]
    axis.set_yticks(range(len(beside)), told, fontsize=7.5)
    axis.set_ylim(len(beside) - 0.5, -0.7)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(length=0)
    axis.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)
    if marks:
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.6 / height), ncols=len(marks), frameon=False, fontsize=8.5)
    title = "Time of others beside Regraft's kernel (the line: right of it they are slower); its own time, share of the ceiling"
    figure.suptitle(title, x=0.02, ha="left", fontsize=10, fontweight="bold", color=INK)
    on = result["machine"].get("gpu") or result["machine"]["cpu"]
    figure.text(0.02, 0.01, f"{on}; {result['command']}, {result['date']}", fontsize=8, color=SOFT)
    figure.tight_layout(rect=(0.03, 0.03, 0.99, 1 - 0.1 / height))
    figure.savefig(picture, dpi=150, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def kind(who: str) -> str:
    """A contestant without what is said of how it ran: "liger, no dropout" is Liger."""
    return who.split(",")[0].split(" (")[0]
