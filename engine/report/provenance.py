"""Where the figures come from: data, configuration, versions, machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from regraft.engine.report.data import ReportData
from regraft.engine.report.formats import count, percent
from regraft.engine.report.markup import Markup, el
from regraft.engine.report.tables import numbers, table, words


def data_notes(data: ReportData) -> Markup | None:
    """Rows of each split, what was dropped by which rule, what was truncated, rows of each label."""
    splits, labels = data.data_notes.get("splits") or {}, data.data_notes.get("labels") or {}
    rows = []
    for name, s in splits.items():
        cut = count(s.get("truncated_rows"))
        if s.get("truncated_rows") and s.get("rows"):
            cut += f" ({percent(s['truncated_rows'] / s['rows'])})"
        file = el("span", s.get("path", ""), class_="where")
        figures = [count(s.get("rows")), count(s.get("tokens")), cut, count(s.get("truncated_tokens"))]
        rows.append([name, file, *figures, dropped(s)])
    columns = words("Split", "File") + numbers("Rows", "Tokens", "Truncated rows", "Tokens cut") + words("Dropped")
    parts = [table(columns, rows)] if rows else []
    parts += [el("div", el("h3", f"Labels in {split}"), _bars(n), class_="below") for split, n in labels.items() if n]
    return el("section", el("h2", "Data"), parts) if parts else None


def dropped(split: Mapping[str, Any]) -> str:
    """'3 missing, 1 empty', or 'none'."""
    rules = split.get("dropped") or {}
    return ", ".join(f"{count(n)} {rule.replace('_', ' ')}" for rule, n in rules.items() if n) or "none"


def settings(data: ReportData) -> Markup:
    """Resolved configuration, versions, machine."""
    written = yaml.safe_dump(_plain(data.config), sort_keys=False, allow_unicode=True, width=100)
    versions = ", ".join(f"{name} {version}" for name, version in data.versions.items())
    model, method = data.setting("model.name"), data.setting("method", "full")
    facts = [("Model", model), ("Method", method), ("Machine", data.machine), ("Versions", versions)]
    listed = el("dl", [[el("dt", name), el("dd", value)] for name, value in facts if value], class_="facts")
    config = el("details", el("summary", "Resolved configuration"), el("pre", written))
    return el("section", el("h2", "Settings"), listed, config)


def _bars(counts: Mapping[str, int]) -> Markup:
    most = max(counts.values()) or 1
    items = []
    for name, n in sorted(counts.items(), key=lambda item: -item[1]):
        bar = el("div", el("i", style=f"width:{100 * n / most:.1f}%"))
        items.append(el("li", el("span", name, title=name), bar, el("b", count(n))))
    return el("ul", items, class_="bars")


def _plain(value: Any) -> Any:
    """The same with YAML's own types only: tuples, paths and numpy numbers have no safe tag."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(v) for v in value]
    if isinstance(value, bool | str | int | float) or value is None:
        return value
    return value.item() if hasattr(value, "item") else str(value)
