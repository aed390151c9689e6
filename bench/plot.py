"""Draw bench/results/*.json as PNG beside them, for the README.

A bar is a contestant's median, a dot is one turn; Regraft is in colour, peers are grey. Claims that are compared by
ratio get a panel a case; figures in points share one axis. What `regraft compare` wrote gets spreads and learning curves,
kernels on a GPU are drawn beside their rivals.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plot_kernels import draw_kernels

from plot_ways import draw_ways

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"
MANY = 30  # cases
WIDTH = 8.0  # inches; at 200 dots an inch sharp in a README 800 pixels wide
INK, SOFT, GRID = "#1f2937", "#6b7280", "#e5e7eb"
OURS = ("#0f766e", "#5eada5", "#a7d3ce")
PEERS = ("#9ca3af", "#c3c8d0", "#dadde2")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, help="JSON files; default: all in bench/results/")
    parser.add_argument("--to", type=Path, help="folder for the pictures; default: beside each JSON")
    options = parser.parse_args()
    paths = options.results or sorted(RESULTS.glob("*.json"))
    if not paths:
        sys.exit(f"no JSON in {RESULTS}; the commands in bench/README.md make it")
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not {"cases", "ways", "rows"} & result.keys():
            continue  # a table for people, such as kernels_static.json
        if not options.results and len(result.get("cases", ())) > MANY:
            continue  # a picture that nobody would read, such as of products_cpu.json
        picture = (options.to or path.parent) / f"{path.stem}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw(result, picture)
        print(picture)


def draw(result: dict[str, Any], picture: Path) -> None:
    """One result as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "font.family": "sans-serif",
        "font.size": 10.5,
        "text.color": INK,
        "axes.edgecolor": GRID,
        "xtick.color": SOFT,
        "ytick.color": INK,
    }
    with plt.rc_context(style):
        if "ways" in result:
            return draw_ways(result, picture, plt)
        if "rows" in result:
            return draw_kernels(result, picture, plt)
        figure = one_axis(result, plt) if result["compare"] == "difference" else panels(result, plt)
        figure.savefig(picture, dpi=200, facecolor="white", metadata={"Software": None})
        plt.close(figure)


def panels(result: dict[str, Any], plt: Any) -> Figure:
    """A panel a case, one below the other; on one scale where their values allow it. Of cases that each have a unit of their
    own only those that have a peer: a lone bar says nothing."""
    cases, shades = result["cases"], colours(contestants(result))
    mixed = "case" in result["unit"]
    if mixed:
        cases = {name: case for name, case in cases.items() if len(case["medians"]) > 1} or cases
    rows = [len(case["medians"]) for case in cases.values()]
    height = frame_height(result) + sum(0.36 * n + 0.62 for n in rows)
    shape = {"figsize": (WIDTH, height), "height_ratios": [0.36 * n + 0.1 for n in rows], "squeeze": False}
    figure, axes = plt.subplots(len(cases), 1, **shape)
    longest = [max(run["value"] for run in case["runs"]) for case in cases.values()]
    alike = not mixed and max(longest) < 3 * min(longest)
    for axis, (name, case), mine in zip(axes[:, 0], cases.items(), longest, strict=True):
        scale = 1.32 * max(max(longest) if alike else mine, 1e-9)  # a loss may be a gain
        who_is = [who for who in shades if who in case["medians"]]
        for place, who in enumerate(who_is):
            median, values = case["medians"][who], turns(case, who)
            bar(axis, place, 0.68, median, values, shades[who])
            text = f"{short(median)}{gained(who, case['ratios'].get(who))}"
            axis.text(max([median, *values]) + 0.012 * scale, place, text, va="center", fontsize=9.5)
        axis.set_xlim(0, scale)
        axis.set_ylim(len(who_is) - 0.45, -0.55)
        axis.set_yticks(range(len(who_is)), who_is)
        axis.set_title(name, loc="left", fontsize=10.5, fontweight="bold", pad=5)
        axis.set_title(elsewhere(result, case), loc="right", fontsize=8, color=SOFT, pad=5)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.4g}" if value < 1000 else f"{value:,.0f}")
        tidy(axis)
    better = "more is better" if result["higher_is_better"] else "less is better"
    axes[-1, 0].set_xlabel("" if mixed else f"{result['unit']}, {better}", color=SOFT, fontsize=9.5)
    return framed(figure, result, height)


def gained(who: str, ratio: float | None) -> str:
    """What Regraft gains over a peer; what a variant of its own gains over its plain form."""
    if ratio is None:
        return ""
    return f"   {1 / ratio:.2f}x regraft" if who.startswith("regraft") else f"   regraft {ratio:.2f}x"


def one_axis(result: dict[str, Any], plt: Any) -> Figure:
    """All cases on one axis from 0 to 100, a group of bars each."""
    cases = result["cases"]
    rows = sum(len(case["medians"]) for case in cases.values())
    height = frame_height(result) + 0.32 * rows + 0.2 * len(cases) + 0.35
    figure, axis = plt.subplots(figsize=(WIDTH, height))
    axis.set_ymargin(0.02)
    shades, place, ticks, several = colours(contestants(result)), 0.0, [], len(contestants(result)) > 1
    for name, case in cases.items():
        first = place
        for who, median in case["medians"].items():
            values = turns(case, who)
            bar(axis, place, 0.8, median, values, shades[who])
            label = f"{median:.1f}" + (f"  {who}" if several and len(case["medians"]) > 1 else "")
            end = max([median, *values])
            if end > 100:  # a perplexity that runs off the axis
                axis.text(99, place, f"{label}  →", va="center", ha="right", fontsize=9.5)
            else:
                axis.text(end + 1.2, place, label, va="center", fontsize=9.5)
            place += 0.9
        measure = case["settings"].get("metric", "").replace("_", " ")
        measure = "(less is better)" if measure == "perplexity" else measure
        ticks.append(((first + place - 0.9) / 2, f"{name}  {measure}"))
        place += 0.55
    axis.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    axis.set_xlim(0, 122)
    axis.set_xticks(range(0, 101, 20))
    axis.invert_yaxis()
    tidy(axis)
    axis.set_xlabel(result["unit"], color=SOFT, fontsize=9.5)
    return framed(figure, result, height)


def bar(axis: Axes, place: float, thick: float, median: float, values: list[float], colour: str) -> None:
    axis.barh(place, median, thick, color=colour, zorder=2)
    if len(values) > 1:
        axis.plot([min(values), max(values)], [place, place], color=INK, linewidth=0.9, zorder=3)
        axis.scatter(values, [place] * len(values), s=9, color="white", edgecolors=INK, linewidths=0.7, zorder=4)


def tidy(axis: Axes) -> None:
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(length=0, labelsize=9.5)
    axis.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)
    axis.set_axisbelow(True)


def headline(result: dict[str, Any]) -> str:
    return "\n".join(textwrap.wrap(result["claim"], 84))


def frame_height(result: dict[str, Any]) -> float:
    """Inches that the title above and the two lines below take."""
    return 1.0 + 0.22 * headline(result).count("\n")


def framed(figure: Figure, result: dict[str, Any], height: float) -> Figure:
    """Title above; the machine, the number of turns and the command below."""
    machine = result["machine"]
    on = machine.get("gpu") or f"{machine['cpu']}, {result['threads']} of {machine['cores']} cores"
    turned = max(len(turns(case, who)) for case in result["cases"].values() for who in case["medians"])
    below = f"{on}; bars: medians, dots: {turned} turn{'s' if turned > 1 else ''}\n{command(result)}, {result['date']}"
    title = headline(result)
    above = 0.38 + 0.22 * title.count("\n")
    figure.text(0.2 / WIDTH, 1 - 0.12 / height, title, va="top", fontsize=11.5, fontweight="bold")
    figure.text(0.2 / WIDTH, 0.1 / height, below, va="bottom", fontsize=8, color=SOFT, linespacing=1.35)
    figure.tight_layout(rect=(0.01, 0.42 / height, 0.99, 1 - above / height), h_pad=0.9)
    return figure


def command(result: dict[str, Any]) -> str:
    """What measured the cases; without its options where they were measured in pieces."""
    given = {case.get("measured", result)["command"] for case in result["cases"].values()}
    return given.pop() if len(given) == 1 else f"{' '.join(result['command'].split()[:2])} (in pieces)"


def contestants(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(who for case in result["cases"].values() for who in case["medians"]))


def colours(everyone: list[str]) -> dict[str, str]:
    """Shades of one colour for Regraft's own contestants, of grey for the others."""
    ours = [who for who in everyone if who.startswith("regraft")]  # first here, so first in every panel
    peers = [who for who in everyone if who not in ours]
    pick = lambda some, shades: {who: shades[min(i, len(shades) - 1)] for i, who in enumerate(some)}  # noqa: E731
    return pick(ours, OURS) | pick(peers, PEERS)


def elsewhere(result: dict[str, Any], case: dict[str, Any]) -> str:
    """Where and when a case was measured if that was not on the machine that the picture names."""
    measured, kind = case.get("measured", result), ("cpu", "flags")
    if all(measured["machine"].get(key) == result["machine"].get(key) for key in kind):
        return ""
    cpu = measured["machine"]["cpu"].replace("(R)", "").removesuffix(" Processor")
    return f"{cpu}, {measured['date']}"


def turns(case: dict[str, Any], who: str) -> list[float]:
    return [run["value"] for run in case["runs"] if run["who"] == who]


def short(value: float) -> str:
    if 0 < value < 0.01:
        return f"{value:.2g}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


if __name__ == "__main__":
    main()
