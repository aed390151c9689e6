"""Which columns hold the text, its pair and the label, and which task that makes: guesses, each with its reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from regraft.engine.data.column_names import LABEL_NAMES, PAIR_NAMES, TEXT_NAMES
from regraft.engine.data.sniff import is_number

Columns = dict[str | int, list[Any]]

SEPARATORS = (",", "|", ";")
MANY_CLASSES = 200


@dataclass(frozen=True)
class Guess:
    """Columns by header name or number; `why` says, a short clause each, what each guess rests on."""

    text: str | int
    pair: str | int | None
    label: str | int | None
    task_type: str
    label_separator: str | None
    why: dict[str, str]


def guess(
    columns: Columns, *, text: Any = None, pair: Any = None, label: Any = None, task_type: str | None = None
) -> Guess:
    """What is given stays; the rest is guessed by name, then by content."""
    why: dict[str, str] = {}
    free = [name for name in columns if name not in (text, pair, label)]
    if label is None:
        label = _label(columns, free, why)
        free = [name for name in free if name != label]
    if text is None:
        text, pair = _texts(columns, free, pair, why)
    values = [] if label is None else [v for v in columns[label] if v not in (None, "")]
    separator = None
    if task_type is None:
        task_type, separator = _task(values, why)
    elif task_type == "multilabel":
        separator = _separator(values)
    return Guess(text, pair, label, task_type, separator, why)


def _label(columns: Columns, free: list[str | int], why: dict[str, str]) -> str | int | None:
    by_name = {str(name).lower(): name for name in free}
    for known in LABEL_NAMES:
        if known in by_name:
            return by_name[known]
    # Of columns whose values come again and again, the one that comes again most without being constant.
    best, share = None, 0.5
    for name in free:
        values = [str(v) for v in columns[name] if v not in (None, "")]
        distinct = len(set(values))
        if distinct < 2 or _words(values) > 6:
            continue
        if distinct / len(values) < share:
            best, share = name, distinct / len(values)
    if best is not None:
        why["label"] = "few different values"
    return best


def _texts(
    columns: Columns, free: list[str | int], pair: Any, why: dict[str, str]
) -> tuple[str | int, str | int | None]:
    by_name = {str(name).lower(): name for name in free}
    if pair is None:
        for one, other in PAIR_NAMES:
            if one in by_name and other in by_name:
                return by_name[one], by_name[other]
    textual = sorted((n for n in free if _is_text(columns[n])), key=lambda n: -_length(columns[n]))
    for known in TEXT_NAMES:
        if known in by_name and by_name[known] in textual:
            return by_name[known], pair
    if not textual:
        rest = free or list(columns)
        why["text"] = "no column looks like text"
        return max(rest, key=lambda n: _length(columns[n])), pair
    why["text"] = "the longest text"
    if pair is None and len(textual) == 2 and _length(columns[textual[1]]) * 2 > _length(columns[textual[0]]):
        first, second = sorted(textual, key=list(columns).index)
        why["text"] = why["text_pair"] = "two columns of text of like length"
        return first, second
    return textual[0], pair


def _is_text(values: list[Any]) -> bool:
    strings = [v for v in values if isinstance(v, str) and v]
    if len(strings) < len(values) / 2 or all(map(is_number, strings)):
        return False
    many = len(set(strings)) > len(strings) * 0.3
    return many and (_words(strings) >= 2 or _length(strings) >= 8) and not _is_key(strings)


def _is_key(strings: list[str]) -> bool:
    # Identifiers: one word each, all different, nearly all of one length.
    one_word = sum(" " not in s for s in strings) > 0.95 * len(strings)
    common = Counter(map(len, strings)).most_common(1)[0][1]
    return one_word and all(s.isascii() for s in strings) and common > 0.6 * len(strings)


def _task(values: list[Any], why: dict[str, str]) -> tuple[str, str | None]:
    if any(isinstance(v, list | tuple) for v in values):
        why["type"] = "the label column holds lists"
        return "multilabel", None
    if values and all(map(is_number, values)):
        if any(not float(v).is_integer() for v in values):
            why["type"] = "the label column holds fractions"
            return "regression", None
        distinct = len(set(map(float, values)))
        if distinct > MANY_CLASSES:
            why["type"] = f"the label column holds {distinct:,} different numbers"
            return "regression", None
    separator = _separator(values)
    if separator:
        why["type"] = f"labels are combined with {separator!r}"
        return "multilabel", separator
    return "classification", None


def _separator(values: list[Any]) -> str | None:
    cells = [v for v in values if isinstance(v, str)]
    for separator in SEPARATORS:
        combined = [c for c in cells if separator in c]
        if len(combined) < max(2, 0.01 * len(cells)):
            continue
        parts = Counter(part.strip() for c in cells for part in c.split(separator))
        # Parts that come again in other combinations are labels; parts of one sentence are not.
        again = sum(n for n in parts.values() if n > 1)
        if again > 0.9 * sum(parts.values()) and len(parts) <= len(set(cells)):
            return separator
    return None


def _words(values: list[str]) -> float:
    return sum(len(str(v).split()) for v in values) / max(len(values), 1)


def _length(values: list[Any]) -> float:
    return sum(len(v) if isinstance(v, str) else 0 for v in values) / max(len(values), 1)
