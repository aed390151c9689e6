"""Documents: read, cut to full length for a language to be learned from, and where their sentences begin."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from regraft.engine.data.rows import Rows
from regraft.engine.errors import DataError

if TYPE_CHECKING:
    from regraft.engine.config import DataConfig

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？；])|\n+")
LEAST = 8  # tokens of text that are worth a sequence of their own


@dataclass(frozen=True)
class Part:
    """Tokens `start` to `end` of document `row`."""

    row: int
    start: int
    end: int


def full_length(lengths: Sequence[int], room: int, specials: int) -> tuple[list[Part], list[int]]:
    """Documents cut so that they fill units of `room` tokens, specials included, one after the other; and how many parts
    each unit has. Parts of a unit do not see each other."""
    parts: list[Part] = []
    units = [0]
    left = room
    for row, length in enumerate(lengths):
        at = 0
        while at < length:
            if left < specials + min(LEAST, length - at):
                units.append(0)
                left = room
            end = min(length, at + left - specials)
            parts.append(Part(row, at, end))
            units[-1] += 1
            left -= specials + end - at
            at = end
    return parts, [count for count in units if count]


def sentence_starts(text: str) -> list[int]:
    """Characters at which sentences begin."""
    return sorted({0, *(found.end() for found in SENTENCE_END.finditer(text) if found.end() < len(text))})


def read_documents(path: str, data: DataConfig, *, split: str, limit: int | None) -> Rows:
    """Documents of a file: rows' texts, or of a .txt file what stands between blank lines (a line each where there are
    none). Raises DataError."""
    from regraft.engine.data.read import iter_texts

    plain = str(path).removesuffix(".gz").endswith(".txt")
    dropped: dict[str, int] = {}
    found = iter_texts(path, data.model_copy(update={"empty": "keep"}) if plain else data, dropped=dropped)
    texts: list[str] = []
    lines: list[int] = []
    for number, text in _documents(((row.line, row.text) for row in found), plain):
        if limit is not None and len(texts) >= limit:
            break
        texts.append(text)
        lines.append(number)
    if not texts:
        raise DataError(f"{path}: no documents")
    return Rows(split, str(path), texts, None, np.array(lines, dtype=np.int64), dropped=dropped)


def _documents(lines: Iterator[tuple[int, str]], plain: bool) -> Iterator[tuple[int, str]]:
    if not plain:
        yield from lines
        return
    every = list(lines)
    if not any(not text.strip() for _, text in every):
        yield from every
        return
    start, held = 0, []
    for number, text in [*every, (0, "")]:
        if text.strip():
            start = start or number
            held.append(text)
        elif held:
            yield start, "\n".join(held)
            start, held = 0, []
