"""Curves of a run: loss, learning rate, gradient norm, speed, and the evaluation's figures over steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from regraft.engine.report.data import Record, ReportData
from regraft.engine.report.formats import ERRORS, SHARES, compact, count, metric_name, metric_value, percent
from regraft.engine.report.markup import Markup, el
from regraft.engine.report.scale import Point, finite, smooth
from regraft.engine.report.svg import Line, line_chart

SMALL = (300.0, 170.0)
COLOURS = ("c1", "c2", "c3", "c4")


def series(records: Sequence[Record], key: str) -> list[Point]:
    """(step, value) of the records that have a finite value."""
    return finite([(r.get("step"), r.get(key)) for r in records])


def noisy(name: str, points: list[Point]) -> list[Line]:
    """A curve as it was (faint) under its mean over a twentieth of the run; a short one as it is."""
    if len(points) < 20:
        return [Line(name, points)]
    return [Line(f"{name}, each step", points, "faint"), Line(name, smooth(points, max(len(points) // 20, 3)))]


def training_curves(data: ReportData) -> Markup:
    """Loss and evaluation figures large, the three that explain them small."""
    train = data.of_kind("train")
    skipped = [step for step, _ in finite([(r.get("step"), 0) for r in data.of_kind("skipped")])]
    small = [
        figure("Learning rate", [Line("learning rate", series(train, "learning_rate"))], size=SMALL),
        figure("Gradient norm", noisy("gradient norm", series(train, "grad_norm")), size=SMALL, notches=skipped),
        figure("Tokens a second", noisy("tokens a second", series(train, "tokens_per_second")), size=SMALL),
    ]
    large = [loss_figure(data, train, skipped), metric_figure(data)]
    rows = [el("div", kept, class_=name) for name, kept in (("two", _some(large)), ("three", _some(small))) if kept]
    return el("section", el("h2", "Training"), rows or el("p", "No training step was recorded.", class_="note"), _skipped(data))


def loss_figure(data: ReportData, train: Sequence[Record], notches: Sequence[float]) -> Markup | None:
    """Training loss and, where the evaluation gives one in the same unit, its loss."""
    key = "mse" if data.task == "regression" else "loss"
    evaluated = finite([(r.get("step"), r.get("metrics", {}).get(key)) for r in data.evaluations])
    points = series(train, "loss")
    lines = noisy("train", points)
    lines += [Line(data.split, evaluated, "c3", dots=True)] if evaluated else []
    return figure("Loss", lines, notches=notches)


def metric_figure(data: ReportData) -> Markup | None:
    """All figures of the evaluation that are shares or correlations; what is equal to another is shown once."""
    names = list(dict.fromkeys(name for r in data.evaluations for name in r.get("metrics", {})))
    chosen = data.best[1] if data.best else None
    names = [chosen] if chosen in ERRORS else [n for n in names if n not in ERRORS]
    names.sort(key=lambda n: n != chosen)
    lines: list[Line] = []
    for name in names:
        points = finite([(r.get("step"), r.get("metrics", {}).get(name)) for r in data.evaluations])
        if points and len(lines) < len(COLOURS) and all(points != line.points for line in lines):
            lines.append(Line(metric_name(name), points, COLOURS[len(lines)], dots=True))
    best = (float(data.best[0]), float(data.best[2])) if data.best and finite([(data.best[0], data.best[2])]) else None
    ring = f"best: {metric_value(chosen or '', best[1])} at step {count(best[0])}" if best else None
    written: Callable[[float], str] = (lambda v: percent(v).replace(".0%", "%")) if all(n in SHARES for n in names) else compact
    title = f"Evaluation on {data.split}"
    return figure(title, lines, floor=None, written=written, best=best if lines else None, ring=ring)


def figure(title: str, lines: Sequence[Line], *, ring: str | None = None, **chart: Any) -> Markup | None:
    """Heading, legend (when there is more than one line to tell apart), chart."""
    drawn = line_chart(lines, title=title, **chart)
    if drawn is None:
        return None
    named = [line for line in lines if line.points and line.style != "faint"]
    keys = [el("span", el("i", class_=line.style), line.name) for line in named] if len(named) > 1 or ring else []
    keys += [el("span", el("i", class_="ring ink"), ring)] if ring else []
    return el("figure", el("h3", title), el("div", keys, class_="legend") if keys else None, drawn)


def _skipped(data: ReportData) -> Markup | None:
    records = data.of_kind("skipped")
    total = int(data.totals.get("skipped") or len(records))
    if not total:
        return None
    steps = [count(r["step"]) for r in records if "step" in r]
    listed = f" (step {', '.join(steps[:12])}{', …' if len(steps) > 12 else ''}; red marks in the charts)" if steps else ""
    noun = "step was" if total == 1 else "steps were"
    said = f"{count(total)} {noun} skipped because the loss or the gradient was not finite{listed}."
    return el("p", said, class_="note warning")


def _some(figures: Sequence[Markup | None]) -> list[Markup]:
    return [f for f in figures if f is not None]
