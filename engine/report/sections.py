"""The parts of the page below the curves. Each gives None when there is nothing to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from regraft.engine.report.data import ReportData
from regraft.engine.report.formats import clip, count, duration, metric_name, metric_value, number, percent
from regraft.engine.report.markup import Markup, el
from regraft.engine.report.plots import NAMED, heat_map, most_confused, reliability, scatter
from regraft.engine.report.tables import Column, meter, table
from regraft.engine.report.summary import model_name

TEXT_COLUMNS = 180
LONG = 16  # rows from which a table scrolls in its own box


def tiles(data: ReportData) -> Markup | None:
    """The figures to take away: what was reached, how long it took, how fast it went."""
    metrics = dict((data.best_record or {}).get("metrics", {}))
    if data.best:
        metrics = {data.best[1]: data.best[2], **metrics}
    if metrics.get("micro_f1") == metrics.get("accuracy"):
        metrics.pop("micro_f1", None)
    shown = [(metric_name(name), metric_value(name, value)) for name, value in list(metrics.items())[:4]]
    totals = data.totals
    seconds, tokens = totals.get("seconds"), totals.get("tokens")
    shown += [("Time", duration(seconds))] if seconds else []
    shown += [("Optimizer steps", count(totals["steps"]))] if totals.get("steps") is not None else []
    shown += [("Tokens a second", count(tokens / seconds))] if seconds and tokens else []
    return el("dl", [el("div", el("dt", name), el("dd", value)) for name, value in shown], class_="tiles") if shown else None


def evaluations(data: ReportData) -> Markup | None:
    """Every evaluation as a table, the kept one in bold."""
    records = data.of_kind("eval")
    if not records:
        return None
    names = list(dict.fromkeys(name for r in records for name in r.get("metrics", {})))
    several = len({r.get("split") for r in records}) > 1
    columns = [Column("Split")] if several else []
    columns += [Column("Step", number=True), Column("Epoch", number=True)]
    columns += [Column(metric_name(n), number=True) for n in names] + [Column("Time", number=True)]
    rows, kept = [], set()
    for i, r in enumerate(records):
        epoch, metrics = r.get("epoch"), r.get("metrics", {})
        if data.best and r.get("step") == data.best[0] and str(r.get("split", "dev")) == data.split:
            kept.add(i)
        row: list[Any] = [r.get("split", "")] if several else []
        row += [count(r.get("step")), f"{epoch:.2f}" if isinstance(epoch, int | float) else "–"]
        rows.append([*row, *(metric_value(n, metrics.get(n)) for n in names), duration(r.get("seconds"))])
    return el("section", el("h2", "Evaluations"), table(columns, rows, kept=kept, tall=len(rows) > LONG))


def confusion(data: ReportData) -> Markup | None:
    found = data.details.get("confusion")
    if not found or not found["labels"]:
        return None
    labels, matrix = [str(name) for name in found["labels"]], found["matrix"]
    drawn, pairs = heat_map(labels, matrix), most_confused(labels, matrix)
    many = len(labels) > NAMED
    key = el(
        "div", el("span", el("i", class_="box c1"), "right"), el("span", el("i", class_="box wrong"), "wrong"),
        el("span", "rows: true, columns: predicted, shade: share of the row"), class_="legend",
    )  # fmt: skip
    caption = el("figcaption", f"{len(labels)} classes in their order; point at a cell for its names.") if many else None
    shown = [el("figure", key, drawn, caption)] if drawn else []
    if pairs:
        columns = [Column("True"), Column("Predicted"), Column("Rows", number=True), Column("Share", number=True)]
        rows = [[true, predicted, count(n), percent(share)] for true, predicted, n, share in pairs[: 20 if many else 8]]
        shown.append(el("div", el("h3", "Most confused"), table(columns, rows)))
    else:
        shown.append(el("p", "No row was taken for another class.", class_="note"))
    return el("section", el("h2", "Confusion"), el("div", shown, class_="two"))


def calibration(data: ReportData) -> Markup | None:
    drawn, error = reliability(data.details.get("calibration") or []), data.calibration_error
    if drawn is None or error is None:
        return None
    bins = data.details["calibration"]
    lean = sum(b["rows"] * (b["confidence"] - b["accuracy"]) for b in bins)
    manner = "more" if lean > 0 else "less"
    said = (
        f"Expected calibration error {percent(error)}: on average the stated probability is that far from how often the "
        f"model is right. Overall it is {manner} sure than right."
    )
    key = el(
        "div", el("span", el("i", class_="box c1"), "how often right"), el("span", el("i", class_="box wrong"), "off by"),
        el("span", "across: how sure the model was"), class_="legend",
    )  # fmt: skip
    columns = [Column("Sure", number=True), Column("Right", number=True), Column("Off by", number=True), Column("Rows", number=True)]
    rows = [
        [percent(b["confidence"]), percent(b["accuracy"]), percent(abs(b["confidence"] - b["accuracy"])), count(b["rows"])] for b in bins
    ]
    return el(
        "section", el("h2", "Calibration"), el("p", said),
        el("div", el("figure", key, drawn), el("div", el("h3", "In numbers"), table(columns, rows)), class_="two"),
    )  # fmt: skip


def regression(data: ReportData) -> Markup | None:
    drawn = scatter(data.details.get("scatter") or [])
    if drawn is None:
        return None
    key = el("div", el("span", "across: true value; up: predicted value; dashed: the same"), class_="legend")
    return el("section", el("h2", "True and predicted values"), el("div", el("figure", key, drawn), class_="two"))


def per_class(data: ReportData) -> Markup | None:
    """Precision, recall, F1, weakest first: these are what a reader can do something about."""
    found = sorted(data.details.get("per_class") or [], key=lambda r: (r["rows"] == 0, r["f1"]))
    if not found:
        return None
    thresholds = any(r.get("threshold") is not None for r in found)
    columns = [Column("Class"), *(Column(n, number=True) for n in ("Precision", "Recall", "F1", "Rows"))]
    columns += [Column("Threshold", number=True)] if thresholds else []
    rows, values = [], []
    for r in found:
        figures = [percent(r["precision"]), percent(r["recall"]), [percent(r["f1"]), meter(r["f1"])], count(r["rows"])]
        rows.append([str(r["label"]), *figures, *([number(r.get("threshold"))] if thresholds else [])])
        sort = [r["precision"], r["recall"], r["f1"], r["rows"], *([r.get("threshold")] if thresholds else [])]
        values.append([None, *(None if v is None else float(v) for v in sort)])
    absent = sum(r["rows"] == 0 for r in found)
    note = f" {absent} of {len(found)} classes had no row to be measured on; they stand last." if absent else ""
    return el(
        "section", el("h2", "Classes"), el("p", f"The weakest first.{note}", class_="note"),
        table(columns, rows, values=values, tall=len(rows) > LONG),
    )  # fmt: skip


def worst(data: ReportData) -> Markup | None:
    """The rows the model is most wrong about: often labels worth a second look."""
    if not data.worst:
        return None
    columns = [Column("Row"), Column("Text"), Column("Expected"), Column("Predicted"), Column("Loss", number=True)]
    rows = []
    for r in data.worst:
        texts = [_clipped(r.get("text", ""))] + ([_clipped(r["pair"], class_="pair")] if r.get("pair") else [])
        rows.append([el("span", r.get("where", ""), class_="where"), texts, r.get("expected", ""), r.get("predicted", ""), number(r.get("loss"))])
    said = "The rows with the highest loss: hard ones, and now and then a wrong label."
    return el("section", el("h2", "Worst errors"), el("p", said, class_="note"), table(columns, rows, cards=True))


def data_notes(data: ReportData) -> Markup | None:
    splits, labels = data.data_notes.get("splits") or {}, data.data_notes.get("labels") or {}
    if not splits and not labels:
        return None
    columns = [Column("Split"), Column("File"), Column("Rows", number=True), Column("Tokens", number=True)]
    columns += [Column("Truncated rows", number=True), Column("Tokens cut", number=True), Column("Dropped")]
    rows = []
    for name, s in splits.items():
        share = f" ({percent(s['truncated_rows'] / s['rows'])})" if s.get("truncated_rows") and s.get("rows") else ""
        dropped = ", ".join(f"{count(n)} {rule.replace('_', ' ')}" for rule, n in (s.get("dropped") or {}).items() if n) or "none"
        rows.append(
            [
                name, el("span", s.get("path", ""), class_="where"), count(s.get("rows")), count(s.get("tokens")),
                count(s.get("truncated_rows")) + share, count(s.get("truncated_tokens")), dropped,
            ]
        )  # fmt: skip
    parts = [table(columns, rows)] if rows else []
    for split, counts in labels.items():
        if counts:
            parts.append(el("h3", f"Labels in {split}", style="margin-top:1.8rem"))
            parts.append(_bars(counts))
    return el("section", el("h2", "Data"), parts)


def settings(data: ReportData) -> Markup:
    """Resolved configuration, versions, machine."""
    written = yaml.safe_dump(_plain(data.config), sort_keys=False, allow_unicode=True, width=100)
    facts = [("Model", str(data.setting("model.name", model_name(data)))), ("Method", str(data.setting("method", "full")))]
    facts += [("Machine", data.machine), ("Versions", ", ".join(f"{name} {v}" for name, v in data.versions.items()))]
    return el(
        "section", el("h2", "Settings"),
        el("dl", [[el("dt", name), el("dd", value)] for name, value in facts if value], class_="facts"),
        el("details", el("summary", "Resolved configuration"), el("pre", written)),
    )  # fmt: skip


def _clipped(text: str, *, class_: str | None = None) -> Markup:
    shown = clip(text, TEXT_COLUMNS)
    return el("span", shown, class_=class_, dir="auto", title=text if shown != text else None)


def _bars(counts: Mapping[str, int]) -> Markup:
    most = max(counts.values()) or 1
    items = [
        el("li", el("span", name, title=name), el("div", el("i", style=f"width:{100 * n / most:.1f}%")), el("b", count(n)))
        for name, n in sorted(counts.items(), key=lambda item: -item[1])
    ]
    return el("ul", items, class_="bars")


def _plain(value: Any) -> Any:
    """The same with YAML's own types only: tuples, paths and numpy numbers have no safe tag."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | str):
        return value
    if hasattr(value, "item"):
        return value.item()
    return value if isinstance(value, int | float) else str(value)
