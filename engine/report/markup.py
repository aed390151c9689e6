"""HTML and SVG elements, escaped by construction: only what `el` made is markup, every other string is text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import Any

VOID = {"meta", "br", "col", "wbr"}
# Not allowed in HTML text: C0 controls (but tab, line feed, carriage return), DEL and C1 controls.
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class Markup(str):
    """A string that is markup already."""

    __slots__ = ()


def text(value: Any) -> Markup:
    """`value` as it may stand between tags or in a quoted attribute."""
    return value if isinstance(value, Markup) else Markup(escape(CONTROLS.sub("\ufffd", str(value)), quote=True))


def join(children: Iterable[Any]) -> Markup:
    """Children after one another; None is left out, lists are joined too."""
    parts = (join(c) if isinstance(c, list | tuple) else text(c) for c in children if c is not None)
    return Markup("".join(parts))


def breakable(name: str) -> list[Any]:
    """A name that may be broken after its joints: `lost_or_stolen_card` has no space to break at."""
    parts = re.split(r"(?<=[_./:-])(?=[^_./:-])", name)
    return [parts[0], *(piece for part in parts[1:] for piece in (el("wbr"), part))]


def el(tag: str, *children: Any, **attributes: Any) -> Markup:
    """`el("td", label, class_="name", data_key=3)`; attributes that are None or False are left out."""
    written = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{text(value)}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{tag}{written}>" if tag in VOID else f"<{tag}{written}>{join(children)}</{tag}>")
