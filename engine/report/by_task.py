"""What the evaluation says of each of several tasks: one table over all, then a section a task."""

from __future__ import annotations

from dataclasses import replace

from regraft.engine.report import sections
from regraft.engine.report.data import ReportData
from regraft.engine.report.formats import count, metric_name, metric_value, number
from regraft.engine.report.markup import Markup, el
from regraft.engine.report.tables import numbers, table, words

PARTS = (sections.confusion, sections.regression, sections.calibration, sections.per_class)


def overview(data: ReportData) -> Markup | None:
    """Every task's main figure, rows, steps and what its loss weighed."""
    tasks, mixing = data.details.get("tasks") or {}, data.details.get("mixing") or {}
    if not tasks:
        return None
    learned = any("log_variance" in m for m in mixing.values())
    columns = words("Task", "Kind", "Figure") + numbers(data.split.capitalize(), "Training rows", "Steps", "Weight")
    columns += numbers("Log-variance") if learned else []
    rows = []
    for name, task in tasks.items():
        metric, own = task["metric"], mixing.get(name, {})
        trained = (data.data_notes.get("splits") or {}).get(f"{name} train", {}).get("rows")
        row = [name, task["type"], metric_name(metric), metric_value(metric, task["metrics"][metric])]
        row += [count(trained), count(own.get("steps")), number(own.get("weight"))]
        rows.append(row + ([number(own.get("log_variance"))] if learned else []))
    said = "The best checkpoint is the one with the highest mean of these figures."
    if learned:
        said += (
            " The weight of each loss was learned: exp(-s), s the log-variance (half of it for a regression); shown as it "
            "was at the end."
        )
    return el("section", el("h2", "Tasks"), el("p", said, class_="note"), table(columns, rows))


def each(data: ReportData) -> list[Markup]:
    """For every task its figures and what its kind of task has to show."""
    found = []
    for name, task in (data.details.get("tasks") or {}).items():
        config = {"task": {"type": task["type"]}}
        alone = replace(data, config=config, best=None, history=(), details=task["details"], worst=(), data_notes={})
        figures = [[metric_name(n), metric_value(n, value)] for n, value in task["metrics"].items()]
        shown = table(words("Figure") + numbers(data.split.capitalize()), figures)
        found.append(el("section", el("h2", f"Task: {name}"), el("div", shown, class_="two")))
        found += [part for part in (make(alone) for make in PARTS) if part is not None]
    return found
