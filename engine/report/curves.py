"""Curves of a run: loss, learning rate, gradient norm, speed, and the evaluation's figures over steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from regraft.engine.report.data import Record, ReportData
from regraft.engine.report.formats import ERRORS, SHARES, compact, count, figure_of, metric_name, metric_value, percent
from regraft.engine.report.lines import Line, line_chart
from regraft.engine.report.markup import Markup, el
from regraft.engine.report.scale import Point, finite, smooth

SMALL = (300.0, 170.0)
COLOURS = ("c1", "c2", "c3", "c4")


def series(records: Sequence[Record], key: str) -> list[Point]:
    """(step, value) of the records that have a finite value."""
    return finite([(r.get("step"), r.get(key)) for r in records])


def steps(records: Sequence[Record]) -> list[Point]:
    """(step, 0) of the records that have a step."""
    return finite([(r.get("step"), 0) for r in records])


def noisy(name: str, points: list[Point]) -> list[Line]:
    """A curve as it was (faint) under its mean over a twentieth of the run; a short one as it is."""
    if len(points) < 20:
        return [Line(name, points)]
    return [Line(f"{name}, each step", points, "faint"), Line(name, smooth(points, max(len(points) // 20, 3)))]


def training_curves(data: ReportData) -> Markup:
    """Loss and evaluation figures large, the three that explain them small."""
    train = data.of_kind("train")
    until = max((step for step, _ in steps(data.history)), default=0.0)
    skipped = [step for step, _ in steps(data.of_kind("skipped"))]
    rate, norm, speed = (series(train, key) for key in ("learning_rate", "grad_norm", "tokens_per_second"))
    large = [loss_figure(data, until, skipped), metric_figure(data, until)]
    small = [
        figure("Learning rate", [Line("learning rate", rate)], size=SMALL, until=until),
        figure("Gradient norm", noisy("gradient norm", norm), size=SMALL, until=until, notches=skipped),
        figure("Tokens a second", noisy("tokens a second", speed), size=SMALL, until=until),
    ]
    rows = [el("div", f, class_=name) for name, f in (("two", large), ("three", small)) if any(f)]
    nothing = el("p", "No training step was recorded.", class_="note")
    return el("section", el("h2", "Training"), rows or nothing, _skipped(data))


def loss_figure(data: ReportData, until: float, notches: Sequence[float]) -> Markup | None:
    """Training loss and, where the evaluation gives one in the same unit, its loss."""
    key = "mse" if data.task == "regression" else "loss"
    evaluated = finite([(r.get("step"), r.get("metrics", {}).get(key)) for r in data.evaluations])
    lines = noisy("train", series(data.of_kind("train"), "loss"))
    lines += [Line(data.split, evaluated, "c3", dots=True)] if evaluated else []
    return figure("Loss", lines, until=until, notches=notches)


def metric_figure(data: ReportData, until: float) -> Markup | None:
    """All figures of the evaluation that are shares or correlations; what is equal to another is shown once."""
    names = list(dict.fromkeys(name for r in data.evaluations for name in r.get("metrics", {})))
    chosen = data.best[1] if data.best else None
    names = [chosen] if chosen in ERRORS else [n for n in names if figure_of(n) not in ERRORS]
    names.sort(key=lambda n: n != chosen)
    lines: list[Line] = []
    for name in names:
        points = finite([(r.get("step"), r.get("metrics", {}).get(name)) for r in data.evaluations])
        if points and len(lines) < len(COLOURS) and all(points != curve.points for curve in lines):
            lines.append(Line(metric_name(name), points, COLOURS[len(lines)], dots=True))
    shares = all(figure_of(n) in SHARES for n in names)
    written: Callable[[float], str] = (lambda v: percent(v).replace(".0%", "%")) if shares else compact
    where = finite([(data.best[0], data.best[2])]) if data.best and lines else []
    best: dict[str, Any] = (
        {"best": where[0], "ring": f"best: {metric_value(str(chosen), where[0][1])}"} if where else {}
    )
    return figure(f"Evaluation on {data.split}", lines, until=until, floor=None, roof=1.0, written=written, **best)


def figure(title: str, lines: Sequence[Line], *, ring: str | None = None, **chart: Any) -> Markup | None:
    """Heading, legend (when there is more than one line to tell apart), chart."""
    drawn = line_chart(lines, title=title, **chart)
    if drawn is None:
        return None
    named = [curve for curve in lines if curve.points and curve.style != "faint"]
    keys = [el("span", el("i", class_=curve.style), curve.name) for curve in named] if len(named) > 1 or ring else []
    keys += [el("span", el("i", class_="ring ink"), ring)] if ring else []
    return el("figure", el("h3", title), el("div", keys, class_="legend") if keys else None, drawn)


def _skipped(data: ReportData) -> Markup | None:
    records = data.of_kind("skipped")
    total = int(data.totals.get("skipped") or len(records))
    if not total:
        return None
    listed = [count(step) for step, _ in steps(records)]
    which = f" (step {', '.join(listed[:12])}{', …' if len(listed) > 12 else ''}; red marks)" if listed else ""
    noun = "step was" if total == 1 else "steps were"
    said = f"{count(total)} {noun} skipped because the loss or the gradient was not finite{which}."
    return el("p", said, class_="note warning")
