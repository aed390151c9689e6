"""What the evaluation says: the parts of the page below the curves. Each gives None when there is nothing to say."""

from __future__ import annotations

from typing import Any

from regraft.engine.report.data import ReportData
from regraft.engine.report.formats import clip, count, duration, metric_name, metric_value, number, percent
from regraft.engine.report.heatmap import NAMED, heat_map, most_confused
from regraft.engine.report.markup import Markup, el
from regraft.engine.report.plots import reliability, scatter
from regraft.engine.report.tables import meter, numbers, table, words

TEXT_COLUMNS = 180
WIDE = 12  # classes from which a confusion matrix with names takes the whole width
LONG = 16  # rows from which a table scrolls in its own box


def tiles(data: ReportData) -> Markup | None:
    """The figures to take away: what was reached, how long it took, how fast it went."""
    metrics = dict((data.best_record or {}).get("metrics", {}))
    if data.best:
        metrics = {data.best[1]: data.best[2], **metrics}
    if metrics.get("micro_f1") == metrics.get("accuracy"):
        metrics.pop("micro_f1", None)
    shown = [(metric_name(name), metric_value(name, value)) for name, value in list(metrics.items())[:3]]
    seconds, tokens, steps = (data.totals.get(key) for key in ("seconds", "tokens", "steps"))
    shown += [("Time", duration(seconds))] if seconds else []
    shown += [("Optimizer steps", count(steps))] if steps is not None else []
    shown += [("Tokens a second", count(tokens / seconds))] if seconds and tokens else []
    pairs = [el("div", el("dt", name), el("dd", value)) for name, value in shown]
    return el("dl", pairs, class_="tiles") if pairs else None


def evaluations(data: ReportData) -> Markup | None:
    """Every evaluation as a table, the kept one in bold."""
    records = data.of_kind("eval")
    if not records:
        return None
    names = list(dict.fromkeys(name for r in records for name in r.get("metrics", {})))
    several = len({r.get("split") for r in records}) > 1
    columns = words(*(["Split"] if several else [])) + numbers("Step", "Epoch", *map(metric_name, names), "Time")
    rows, kept = [], set()
    for i, r in enumerate(records):
        epoch, metrics = r.get("epoch"), r.get("metrics", {})
        if data.best and r.get("step") == data.best[0] and str(r.get("split", "dev")) == data.split:
            kept.add(i)
        row = [r.get("split", "")] if several else []
        row += [count(r.get("step")), f"{epoch:.2f}" if isinstance(epoch, int | float) else "–"]
        rows.append([*row, *(metric_value(n, metrics.get(n)) for n in names), duration(r.get("seconds"))])
    return el("section", el("h2", "Evaluations"), table(columns, rows, kept=kept, tall=len(rows) > LONG))


def confusion(data: ReportData) -> Markup | None:
    found = data.details.get("confusion")
    if not found or not found["labels"]:
        return None
    labels, matrix = [str(name) for name in found["labels"]], found["matrix"]
    drawn, mistakes = heat_map(labels, matrix), most_confused(labels, matrix)
    many = len(labels) > NAMED
    key = legend(("c1", "right"), ("wrong", "wrong"), said="rows: true, columns: predicted, shade: share of the row")
    caption = f"{count(len(labels))} classes in their order; point at a cell for its names." if many else None
    shown = [el("figure", key, drawn, el("figcaption", caption) if caption else None)] if drawn else []
    if mistakes:
        rows = [[true, other, count(n), percent(share)] for true, other, n, share in mistakes[: 16 if many else 8]]
        columns = words("True", "Predicted") + numbers("Rows", "Share")
        shown.append(el("div", el("h3", "Most confused"), table(columns, rows)))
    else:
        shown.append(el("p", "No row was taken for another class.", class_="note"))
    wide = WIDE < len(labels) <= NAMED  # its names would be too small to read in half the page
    return el("section", el("h2", "Confusion"), el("div", shown, class_="stack" if wide else "two"))


def calibration(data: ReportData) -> Markup | None:
    bins = data.details.get("calibration") or []
    drawn, error = reliability(bins), data.calibration_error
    if drawn is None or error is None:
        return None
    lean = sum(b["rows"] * (b["confidence"] - b["accuracy"]) for b in bins) / sum(b["rows"] for b in bins)
    manner = "about as sure as right" if abs(lean) < 0.005 else f"{'more' if lean > 0 else 'less'} sure than right"
    said = (
        f"Expected calibration error {percent(error)}: on average the stated probability is that far from how often "
        f"the model is right. Overall it is {manner}."
    )
    key = legend(
        ("c1", "how often right"), ("wrong", "off by"), said="across: how sure; dashed: equally sure and right"
    )
    rows = []
    for b in bins:
        sure, right = b["confidence"], b["accuracy"]
        rows.append([percent(sure), percent(right), percent(abs(sure - right)), count(b["rows"])])
    in_numbers = el("div", el("h3", "In numbers"), table(numbers("Sure", "Right", "Off by", "Rows"), rows))
    both = el("div", el("figure", key, drawn), in_numbers, class_="two")
    return el("section", el("h2", "Calibration"), el("p", said), both)


def regression(data: ReportData) -> Markup | None:
    drawn = scatter(data.details.get("scatter") or [])
    if drawn is None:
        return None
    key = legend(said="across: true value; up: predicted value; dashed: the two are equal")
    return el("section", el("h2", "True and predicted values"), el("div", el("figure", key, drawn), class_="two"))


def per_class(data: ReportData) -> Markup | None:
    """Precision, recall, F1, weakest first: these are what a reader can do something about."""
    found = sorted(data.details.get("per_class") or [], key=lambda r: (r["rows"] == 0, r["f1"]))
    if not found:
        return None
    limits = ["threshold"] if any(r.get("threshold") is not None for r in found) else []
    columns = words("Class") + numbers("Precision", "Recall", "F1", "Rows", *map(str.capitalize, limits))
    rows: list[list[Any]] = []
    for r in found:
        figures = [percent(r["precision"]), percent(r["recall"]), [meter(r["f1"]), percent(r["f1"])], count(r["rows"])]
        rows.append([str(r["label"]), *figures, *(number(r.get(key)) for key in limits)])
    values = [[None, *(r.get(key) for key in ("precision", "recall", "f1", "rows", *limits))] for r in found]
    absent = sum(r["rows"] == 0 for r in found)
    note = f" {absent} of {len(found)} classes had no row to be measured on; they stand last." if absent else ""
    shown = table(columns, rows, values=values, tall=len(rows) > LONG)
    return el("section", el("h2", "Classes"), el("p", f"The weakest first.{note}", class_="note"), shown)


def worst(data: ReportData) -> Markup | None:
    """The rows the model is most wrong about: often labels worth a second look."""
    if not data.worst:
        return None
    rows = []
    for r in data.worst:
        texts = [_clipped(r.get("text", ""))] + ([_clipped(r["pair"], class_="pair")] if r.get("pair") else [])
        where = el("span", r.get("where", ""), class_="where")
        rows.append([where, texts, r.get("expected", ""), r.get("predicted", ""), number(r.get("loss"))])
    said = el("p", "The rows with the highest loss: hard ones, and now and then a wrong label.", class_="note")
    columns = words("Row", "Text", "Expected", "Predicted") + numbers("Loss")
    return el("section", el("h2", "Worst errors"), said, table(columns, rows, cards=True))


def legend(*boxes: tuple[str, str], said: str) -> Markup:
    """Colour and name of each thing drawn, then in words what the axes are."""
    keys = [el("span", el("i", class_=f"box {style}"), name) for style, name in boxes]
    return el("div", keys, el("span", said), class_="legend")


def _clipped(text: Any, *, class_: str | None = None) -> Markup:
    full = str(text)
    shown = clip(full, TEXT_COLUMNS)
    return el("span", shown, class_=class_, dir="auto", title=full if shown != full else None)
