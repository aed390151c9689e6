"""Tables: words to the left, numbers to the right."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from regraft.engine.report.markup import Markup, breakable, el


@dataclass(frozen=True)
class Column:
    name: str
    number: bool = False


def words(*names: str) -> list[Column]:
    return [Column(name) for name in names]


def numbers(*names: str) -> list[Column]:
    return [Column(name, number=True) for name in names]


def table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[Any]],
    *,
    values: Sequence[Sequence[Any]] | None = None,
    kept: Collection[int] = (),
    tall: bool = False,
    cards: bool = False,
) -> Markup:
    """`values`: the numbers that cells sort by (None: by their text), which also makes the table sortable; `kept`:
    rows in bold; `tall`: scrolls in a box of its own; `cards`: one block a row on a phone."""
    head = el("thead", el("tr", [el("th", c.name, class_="n" if c.number else None, scope="col") for c in columns]))
    body = []
    for i, row in enumerate(rows):
        keys = values[i] if values else [None] * len(row)
        cells = [_cell(*cell, cards=cards) for cell in zip(columns, row, keys, strict=True)]
        body.append(el("tr", cells, class_="kept" if i in kept else None))
    classes = " ".join(name for name, on in (("sortable", values is not None), ("cards", cards)) if on)
    whole = el("table", head, el("tbody", body), class_=classes or None)
    return el("div", whole, class_="scroll tall" if tall else "scroll")


def _cell(column: Column, content: Any, key: Any, *, cards: bool) -> Markup:
    said = column.name if cards and column.name not in ("Row", "Text") else None
    if column.number:
        return el("td", content, class_="n", data_value=None if key is None else repr(float(key)), data_label=said)
    if isinstance(content, Markup | list):
        return el("td", content, data_label=said)
    return el("td", breakable(str(content)), class_=None if cards else "name", data_label=said)


def meter(share: float) -> Markup:
    """A small bar to stand before a figure in [0, 1]."""
    filled = f"width:{100 * min(max(float(share), 0), 1):.0f}%"
    return el("span", el("i", style=filled), class_="meter", aria_hidden="true")
