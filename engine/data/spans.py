"""Rows whose labels are spans of characters: CoNLL and CoNLL-U sentences, lists of words with tags, texts with spans.

Each row's label is a tuple of (start, end, type); `pairs` holds the words' spans where the source gives words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from regraft.engine.config import DataConfig
from regraft.engine.data.cells import Absent, open_cells
from regraft.engine.data.conll import read_sentences
from regraft.engine.data.rows import Rows
from regraft.engine.data.source import HUB, find_source
from regraft.engine.errors import DataError, at, nearest
from regraft.engine.tasks.schemes import chunks, guess_scheme, is_scheme_tag, refuse
from regraft.engine.tasks.words import Words, joined

CharSpans = tuple[tuple[int, int, str], ...]
COLUMNS = ("conll", "conllu")


def read_spans(
    path: str, data: DataConfig, *, split: str, need_labels: bool, limit: int | None, scheme: str = "auto"
) -> Rows:
    """Rows of any format, with spans where `need_labels`. Raises DataError naming file, line and what is wrong there."""
    texts: list[str] = []
    labels: list[CharSpans | None] = []
    beside: list[Words | None] = []
    lines: list[int] = []
    dropped: dict[str, int] = {}
    used = _Scheme(scheme)
    for line, text, words, spans in _rows(path, data, split, need_labels, used, dropped):
        if limit is not None and len(texts) >= limit:
            break
        texts.append(text)
        labels.append(spans)
        beside.append(words)
        lines.append(line)
    if not texts:
        left_out = ", ".join(f"{n} {rule}" for rule, n in dropped.items())
        raise DataError(f"{path}: no rows" + (f" are left (dropped: {left_out})" if left_out else ""))
    return Rows(
        split,
        str(path),
        texts,
        None if None in labels else labels,
        np.array(lines, dtype=np.int64),
        pairs=None if all(words is None for words in beside) else beside,
        dropped=dropped,
        scheme=used.found,
    )


class _Scheme:
    """The scheme that tags are read by: the one that is asked for, or what all tags of the file look like."""

    def __init__(self, asked: str) -> None:
        self.asked = asked
        self.found: str | None = None  # None as long as there were no tags

    def of(self, sentences: Sequence[Sequence[str]]) -> str:
        used = guess_scheme(sentences) if self.asked == "auto" else self.asked
        if any(sentences):
            self.found = used
        return used


_Row = tuple[int, str, Words | None, CharSpans | None]


def _rows(
    path: str, data: DataConfig, split: str, need_labels: bool, scheme: _Scheme, dropped: dict[str, int]
) -> Iterator[_Row]:
    if str(path).startswith(HUB):
        from regraft.engine.data.hub import open_hub

        with open_hub(str(path), data, split=split, need_labels=need_labels) as table:
            yield from _cells(table.cells, str(path), data, need_labels, scheme, dropped)
        return
    source = find_source(path, data, plain_text=not need_labels)
    if source.format not in COLUMNS:
        with open_cells(source, data, need_labels=need_labels) as table:
            yield from _cells(table.cells, str(path), data, need_labels, scheme, dropped)
        return
    sentences = list(read_sentences(source, data, need_labels=need_labels))
    used = scheme.of([s.tags for s in sentences])
    for s in sentences:
        text, words = joined(s.words)
        places = [at(path, line) for line in s.lines]
        yield s.lines[0], text, words, spans_of_tags(s.tags, words, used, places) if s.tags and need_labels else None


def spans_of_tags(tags: Sequence[str], words: Words, scheme: str, places: Sequence[str]) -> CharSpans:
    """Spans of characters for tags of words. Raises DataError at a tag outside the scheme."""
    if scheme == "none":
        return tuple((start, end, tag) for (start, end), tag in zip(words, tags, strict=True))
    wrong = refuse(tags, scheme) if scheme != "any" else None
    if wrong is not None:
        raise DataError(f"{places[wrong[0]]}: {wrong[1]}")
    return tuple((words[first][0], words[last - 1][1], kind) for first, last, kind in chunks(tags))


def _cells(
    cells: Iterator[Any], path: str, data: DataConfig, need_labels: bool, scheme: _Scheme, dropped: dict[str, int]
) -> Iterator[_Row]:
    found = list(cells)
    listed = [tags for _, text, _, tags in found if isinstance(text, list) and isinstance(tags, list)]
    used = scheme.of([[str(tag) for tag in tags] for tags in listed])
    for line, text, _, label in found:
        place = at(path, line, data.columns.text)
        if isinstance(text, Absent):
            raise DataError(f"{place}: the text {text.told}")
        blank = text is None or not text or (isinstance(text, str) and text.isspace())
        if blank:
            if data.empty == "drop" or (text is None and data.missing == "drop"):
                dropped["empty"] = dropped.get("empty", 0) + 1
                continue
            raise DataError(f"{place}: the text is empty; set data.empty: drop to leave such rows out")
        has_label = need_labels and label is not None and not isinstance(label, Absent)
        if need_labels and not has_label:
            raise DataError(f"{at(path, line, data.columns.label)}: there are no spans; a text without any has []")
        place = at(path, line, data.columns.label)
        if isinstance(text, list):
            words = _word_list(text, at(path, line, data.columns.text))
            content, spans = joined(words)
            tags = None if not has_label else _tag_list(label, len(words), place)
            chars = None if tags is None else spans_of_tags(tags, spans, used, [place] * len(tags))
            yield line, content, spans, chars
        elif isinstance(text, str):
            _whole(text, at(path, line, data.columns.text))
            yield line, text, None, _apart(label, text, place, data, dropped) if has_label else None
        else:
            raise DataError(f"{at(path, line, data.columns.text)}: expected a text or a list of words, found {text!r}")


def _apart(label: Any, text: str, place: str, data: DataConfig, dropped: dict[str, int]) -> CharSpans:
    """The row's spans, none of which overlaps another, by the rule `data.overlap`."""
    spans = char_spans(label, text, place)
    overlaps = [(one, other) for one, other in zip(spans, spans[1:], strict=False) if other[0] < one[1]]
    if not overlaps:
        return spans
    if data.overlap == "error":
        one, other = overlaps[0]
        shown = f"{text[one[0] : one[1]]!r} ({one[2]}) and {text[other[0] : other[1]]!r} ({other[2]})"
        raise DataError(
            f"{place}: spans overlap: {shown}, {one[0]} to {one[1]} and {other[0]} to {other[1]}; "
            "data.overlap: longest keeps the longer one"
        )
    kept: list[tuple[int, int, str]] = []
    for span in sorted(spans, key=lambda s: (s[0] - s[1], s)):
        if all(span[1] <= other[0] or other[1] <= span[0] for other in kept):
            kept.append(span)
    dropped["overlapping spans"] = dropped.get("overlapping spans", 0) + len(spans) - len(kept)
    return tuple(sorted(kept))


def _whole(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: \\u{ord(text[error.start]):04x} is half of a character") from None


def _word_list(words: list[Any], place: str) -> list[str]:
    for i, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            raise DataError(f"{place}: word {i + 1}: expected a text, found {word!r}")
        _whole(word, place)
    return words


def _tag_list(tags: Any, words: int, place: str) -> list[str]:
    if not isinstance(tags, list) or len(tags) != words:
        count = f"{len(tags)} tags" if isinstance(tags, list) else repr(tags)
        raise DataError(f"{place}: expected a list of {words} tags, one a word, found {count}")
    return [str(tag) for tag in tags]


def char_spans(label: Any, text: str, place: str) -> CharSpans:
    """Spans as objects with start, end and label, as lists of the three, or as {type: {surface: [[first, last]]}}.

    Sorted. Raises DataError for a span that is out of range or empty.
    """
    if isinstance(label, str):
        try:
            label = json.loads(label)
        except ValueError:
            raise DataError(f"{place}: expected a list of spans, found {label[:60]!r}") from None
    spans = sorted(_by_surface(label, text, place) if isinstance(label, dict) else _listed(label, place))
    for start, end, kind in spans:
        if not 0 <= start < end <= len(text):
            raise DataError(
                f"{place}: span {start} to {end} ({kind}) is {'empty' if start >= end else 'out of range'}: the text has {len(text)} characters"
            )
    return tuple(spans)


def _listed(label: Any, place: str) -> Iterator[tuple[int, int, str]]:
    if not isinstance(label, list):
        raise DataError(f"{place}: expected a list of spans, found {label!r}")
    for item in label:
        if isinstance(item, dict):
            missing = [key for key in ("start", "end", "label") if key not in item]
            if missing:
                raise DataError(f"{place}: a span needs start, end and label{nearest(missing[0], item)}; found {item}")
            values = (item["start"], item["end"], item["label"])
        else:
            values = tuple(item) if isinstance(item, list) else ()
        if len(values) != 3 or not all(isinstance(v, int) for v in values[:2]) or not isinstance(values[2], str):
            raise DataError(f"{place}: expected a span as [start, end, label], found {item!r}")
        yield values


def _is_place(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)


def _by_surface(label: dict[str, Any], text: str, place: str) -> Iterator[tuple[int, int, str]]:
    if {"start", "end", "label"} <= set(label):
        raise DataError(f"{place}: expected a list of spans, found one span that is in no list: {label}")
    for kind, surfaces in label.items():
        for surface, places in surfaces.items() if isinstance(surfaces, dict) else [("", None)]:
            if not isinstance(places, list) or not all(map(_is_place, places)):
                raise DataError(
                    f"{place}: expected {{type: {{surface: [[first, last]]}}}}, the characters it stands at, found "
                    f"{kind!r}: {surfaces!r}"
                )
            for first, last in places:
                if text[first : last + 1] != surface:
                    raise DataError(
                        f"{place}: {surface!r} ({kind}) does not stand at {first} to {last}, where the text has {text[first : last + 1]!r}"
                    )
                yield first, last + 1, kind


__all__ = ["CharSpans", "char_spans", "is_scheme_tag", "read_spans", "spans_of_tags"]
