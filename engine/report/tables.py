"""Tables: words to the left, numbers to the right."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from regraft.engine.report.markup import Markup, el


@dataclass(frozen=True)
class Column:
    name: str
    number: bool = False


def table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[Any]],
    *,
    values: Sequence[Sequence[float | None]] | None = None,
    kept: Collection[int] = (),
    tall: bool = False,
    cards: bool = False,
) -> Markup:
    """`values`: what cells sort by, and that the table can be sorted; `kept`: rows in bold; `tall`: scrolls in a box
    of its own; `cards`: one block a row on a phone."""
    head = el("thead", el("tr", [el("th", c.name, class_="n" if c.number else None, scope="col") for c in columns]))
    body = [
        el("tr", [_cell(c, cell, values[i][j] if values else None, cards) for j, (c, cell) in enumerate(zip(columns, row, strict=True))],
           class_="kept" if i in kept else None)
        for i, row in enumerate(rows)
    ]  # fmt: skip
    classes = " ".join(name for name, on in (("sortable", values is not None), ("cards", cards)) if on)
    return el("div", el("table", head, el("tbody", body), class_=classes or None), class_="scroll tall" if tall else "scroll")


def _cell(column: Column, content: Any, value: float | None, cards: bool) -> Markup:
    named = column.name if cards and column.name not in ("Row", "Text") else None
    is_name = not column.number and not cards and isinstance(content, str)
    return el("td", content, class_="n" if column.number else "name" if is_name else None, data_value=value, data_label=named)


def meter(share: float) -> Markup:
    """A small bar beside a figure in [0, 1]."""
    return el("span", el("i", style=f"width:{100 * min(max(float(share), 0), 1):.0f}%"), class_="meter", aria_hidden="true")
