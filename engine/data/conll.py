"""Sentences in columns, one word a line, a blank line between: CoNLL and CoNLL-U."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from regraft.engine.config import DataConfig
from regraft.engine.data.source import Source, open_lines
from regraft.engine.errors import DataError, at, nearest

CONLLU = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")


@dataclass(frozen=True)
class Sentence:
    """`lines` [N] are the words' 1-based lines in the file; `tags` is empty where the file has no such column."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    lines: tuple[int, ...]


def read_sentences(source: Source, data: DataConfig, *, need_labels: bool) -> Iterator[Sentence]:
    """Sentences of a file. Raises DataError naming file and line at another number of columns."""
    table = source.format == "conllu"
    words: list[str] = []
    tags: list[str] = []
    lines: list[int] = []
    width = len(CONLLU) if table else 0
    with open_lines(source, newline="\n") as content:
        for number, raw in enumerate(content, 1):
            line = raw.rstrip("\r\n")
            if not line.strip():
                if words:
                    yield Sentence(tuple(words), tuple(tags), tuple(lines))
                words, tags, lines = [], [], []
                continue
            if (table and line.startswith("#")) or line.startswith("-DOCSTART-"):
                continue
            cells = line.split("\t") if table or "\t" in line else line.split()
            width = width or len(cells)
            if len(cells) != width:
                shown = " | ".join(cells[:6])
                raise DataError(f"{at(source.path, number)}: expected {width} columns, found {len(cells)}: {shown}")
            if table and not cells[0].isdigit():  # 3-4: words written as one; 5.1: a word that was left out
                continue
            text, label = _columns(source, data, width, table, need_labels)
            word = cells[text].strip()
            if not word:
                raise DataError(f"{at(source.path, number)}: the word is empty")
            words.append(word)
            lines.append(number)
            if label is not None:
                tags.append(cells[label].strip())
    if words:
        yield Sentence(tuple(words), tuple(tags), tuple(lines))


def _columns(source: Source, data: DataConfig, width: int, table: bool, need_labels: bool) -> tuple[int, int | None]:
    text = _column(source, data.columns.text, "text", "form", 0, width, table)
    if width == 1 and not need_labels:
        return text, None
    return text, _column(source, data.columns.label, "label", "upos", width - 1, width, table)


def _column(source: Source, given: str | int, key: str, in_table: str, default: int, width: int, table: bool) -> int:
    if isinstance(given, int):
        if not -width <= given < width:
            raise DataError(f"{source}: no column {given} (data.columns.{key}); there are {width}, numbered from 0")
        return given % width
    if given == key:  # not set
        given = in_table if table else ""
    if not table:
        if given:
            raise DataError(f"{source}: data.columns.{key}: {given!r}; columns of a CoNLL file are 0-based numbers")
        if width == 1 and key == "label":
            raise DataError(f"{source}: has one column only, so there are no tags")
        return default
    if given not in CONLLU:
        raise DataError(
            f"{source}: no column {given!r} (data.columns.{key}){nearest(given, CONLLU)}; columns: {', '.join(CONLLU)}"
        )
    return CONLLU.index(given)
