"""The comparison as a table for the terminal and as one HTML page with the learning curves."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regraft.engine.compare.results import Result, advice, ranked
from regraft.engine.compare.spread import spread_chart
from regraft.engine.figures import figure
from regraft.engine.files import write_text
from regraft.engine.report.formats import count, duration, metric_name
from regraft.engine.report.lines import Line, line_chart
from regraft.engine.report.markup import Markup, el
from regraft.engine.report.style import STYLE
from regraft.engine.report.tables import numbers, table, words

HEAD = ("metric", "spread", "seeds", "train s", "latency ms", "MB on disk", "memory MB")
DRAWN = 4  # curves with a colour of their own


def cells(result: Result, metric: str) -> list[str]:
    """Mean, spread, seeds, training seconds, milliseconds a text, megabytes on disk, megabytes of memory."""
    if not result.complete:
        return ["–"] * len(HEAD)
    spread = result.spread(metric)
    return [
        figure(result.mean(metric)),
        "–" if math.isnan(spread) else figure(spread),
        str(len(result.values(metric))),
        f"{result.median('train_seconds'):.1f}",
        f"{result.median('latency_ms'):.1f}",
        f"{result.median('mb'):.1f}",
        f"{result.memory_mb:.0f}",
    ]


def text_table(results: Sequence[Result], metric: str) -> str:
    """The rows as they were asked for, under one another."""
    wide = max(len(r.title) for r in results)
    lines = [f"{'':{wide}}  " + "  ".join(f"{h:>10}" for h in (metric, *HEAD[1:]))]
    for result in results:
        line = f"{result.title:{wide}}  " + "  ".join(f"{c:>10}" for c in cells(result, metric))
        lines.append(line + (f"  {result.why}" if result.why else ""))
    return "\n".join(lines)


def write_comparison(
    folder: Path, results: Sequence[Result], *, name: str, metric: str, greater_is_better: bool, notes: dict[str, Any]
) -> Path:
    """Write compare.json and compare.html; returns the page's path."""
    said = advice(results, metric, greater_is_better)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"metric": metric, "advice": said, "ways": [asdict(r) for r in results], **notes}
    write_text(folder / "compare.json", json.dumps(whole, indent=2) + "\n")
    lead = el("p", said, class_="lead")
    header = el("header", el("p", "Comparison", class_="eyebrow"), el("h1", name), lead)
    main = el(
        "main",
        header,
        _figures(results, metric, greater_is_better),
        _curves(results, metric, greater_is_better),
        _notes(results, notes),
    )
    head = el("head", el("meta", charset="utf-8"), el("meta", name="viewport", content="width=device-width, initial-scale=1"),
              el("title", f"{name} · comparison"), el("style", Markup(STYLE)))  # fmt: skip
    return write_text(folder / "compare.html", f"<!doctype html>\n{el('html', head, el('body', main), lang='en')}\n")


def _figures(results: Sequence[Result], metric: str, greater_is_better: bool) -> Markup:
    order = ranked(results, metric, greater_is_better)
    best = {i for i, r in enumerate(results) if order and r is order[0]}
    columns = words("Way") + numbers(metric_name(metric), *(h.capitalize() for h in HEAD[1:]))
    rows = [[r.title, *cells(r, metric)] for r in results]
    drawn = spread_chart(order, metric)
    note = el("p", "Dot: mean; bar: one standard deviation to either side; faint: each seed or fold.", class_="note")
    shown = [el("figure", el("h3", f"{metric_name(metric)} with its spread"), drawn), note] if drawn else []
    return el("section", el("h2", "Figures"), table(columns, rows, kept=best), shown)


def _curves(results: Sequence[Result], metric: str, greater_is_better: bool) -> Markup | None:
    order = ranked(results, metric, greater_is_better)
    several = [r for r in order if len({p["share"] for p in r.points}) > 1]
    if not several:
        return None
    lines = []
    for i, result in enumerate(several):
        shares = sorted({p["share"] for p in result.points})
        points = [(math.log10(result.median("rows", s)), result.mean(metric, s)) for s in shares]
        style = f"c{i + 1}" if i < DRAWN else "faint"
        lines.append(Line(result.title, points, style, dots=True))
    drawn = line_chart(lines, title=f"{metric} over rows", until=max(x for c in lines for x, _ in c.points), floor=None)
    keys = [el("span", el("i", class_=c.style), c.name) for c in lines[:DRAWN]]
    rows = [
        [r.title, *(f"{count(p['rows'])}: {figure(p['metrics'][metric])}" for p in r.points if p["seed"] == 0)]
        for r in several
    ]
    widest = max(len(r) for r in rows)
    grid = table(words("Way") + numbers(*[""] * (widest - 1)), [[*r, *[""] * (widest - len(r))] for r in rows])
    note = el("p", "Across: rows, as powers of ten. Below, rows: figure, of the first seed.", class_="note")
    curves = el(
        "figure", el("h3", f"{metric_name(metric)} over training rows"), el("div", keys, class_="legend"), drawn
    )
    return el("section", el("h2", "Learning curves"), curves, note, grid)


def _notes(results: Sequence[Result], notes: dict[str, Any]) -> Markup:
    left = [el("li", f"{r.title}: {r.why}") for r in results if r.why]
    facts = [el("li", f"{key.replace('_', ' ')}: {value}") for key, value in notes.items()]
    parts = [el("h3", "Not measured"), el("ul", left)] if left else []
    spent = sum(p["wall_seconds"] for r in results for p in r.points)
    return el("section", el("h2", "Notes"), el("ul", facts), el("p", f"{duration(spent)} in all."), parts)
