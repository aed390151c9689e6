"""Questions with contexts and answers: SQuAD 1.1 and 2.0 json, CMRC's, and one object a line.

Rows: `texts` are questions, `pairs` contexts, labels `Answers`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from regraft.engine.config import DataConfig
from regraft.engine.data.rows import Rows
from regraft.engine.data.source import HUB, find_source, open_lines
from regraft.engine.errors import DataError, at, nearest


@dataclass(frozen=True)
class Answers:
    """What counts as right: texts with the character each begins at; none for a question without an answer."""

    id: str
    texts: tuple[str, ...]
    starts: tuple[int, ...]


def read_questions(path: str, data: DataConfig, *, split: str, need_labels: bool, limit: int | None) -> Rows:
    """Rows of a file. Raises DataError naming file and question."""
    found: list[tuple[str, str, Answers | None, int]] = []
    dropped: dict[str, int] = {}
    for item in _items(path, data, split):
        if limit is not None and len(found) >= limit:
            break
        blank = [part for part in (item.question, item.context) if isinstance(part, str) and not part.strip()]
        if blank and data.empty == "drop":
            dropped["empty"] = dropped.get("empty", 0) + 1
            continue
        found.append(_checked(item, need_labels))
    if not found:
        raise DataError(f"{path}: no questions")
    questions, contexts, answers, lines = zip(*found, strict=True)
    return Rows(
        split,
        str(path),
        list(questions),
        None if None in answers else list(answers),
        np.array(lines, dtype=np.int64),
        pairs=list(contexts),
        dropped=dropped,
    )


@dataclass(frozen=True)
class _Item:
    place: str
    line: int
    id: str
    question: Any
    context: Any
    answers: Any


def _items(path: str, data: DataConfig, split: str) -> Iterator[_Item]:
    columns = data.columns
    names = tuple(
        default if given == unset else str(given)
        for given, unset, default in (
            (columns.text, "text", "question"),
            (columns.text_pair, None, "context"),
            (columns.label, "label", "answers"),
        )
    )
    if str(path).startswith(HUB) or data.format == "parquet" or str(path).endswith((".parquet", ".pq")):
        yield from _table(path, data, split, names)
        return
    source = find_source(path, data)
    with open_lines(source, newline="\n") as lines:
        content = "".join(lines)
    from regraft.engine.data.cells import parse_json_line

    whole = _whole(str(path), content)
    if isinstance(whole, dict) and "data" in whole:
        whole = whole["data"]
        if not isinstance(whole, list):
            raise DataError(f"{path}: 'data': expected a list of articles with paragraphs, found {_shown(whole)}")
    if isinstance(whole, list):
        yield from _squad(str(path), whole)
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            values = parse_json_line(line, path, number)
            yield _of_object(values, names, at(path, number), number)


def _whole(path: str, content: str) -> Any:
    """The file as one JSON value, None where it has an object a line. Raises DataError where its first line is none."""
    try:
        return json.loads(content)
    except RecursionError:
        raise DataError(f"{path}: not usable JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        try:
            json.loads(next((line for line in content.split("\n") if line.strip()), ""))
        except ValueError:
            place = f"{at(path, error.lineno)}: not valid JSON: {error.msg} at character {error.colno}"
            raise DataError(place) from None
        return None


def _shown(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else shown[:59] + "…"


def _table(path: str, data: DataConfig, split: str, names: tuple[str, ...]) -> Iterator[_Item]:
    from regraft.engine.data.cells import open_cells
    from regraft.engine.data.hub import open_hub

    columns = data.columns.model_copy(update={"text": names[0], "text_pair": names[1], "label": names[2]})
    data = data.model_copy(update={"columns": columns})
    if str(path).startswith(HUB):
        opened = open_hub(str(path), data, split=split, need_labels=False)
    else:
        opened = open_cells(find_source(path, data), data, need_labels=False)
    with opened as table:
        for line, question, context, answers in table.cells:
            yield _Item(at(path, line), line, str(line), question, context, answers)


def _of_object(values: dict[str, Any], names: tuple[str, ...], place: str, line: int) -> _Item:
    question, context, answers = names
    for name in (question, context):
        if name not in values:
            raise DataError(f"{place}: there is no key {name!r}{nearest(name, values)}, only {', '.join(values)}")
    found = values.get(answers)
    if values.get("is_impossible"):
        found = []
    return _Item(place, line, str(values.get("id", line)), values[question], values[context], found)


def _squad(path: str, articles: list[Any]) -> Iterator[_Item]:
    number = 0
    for place, paragraph in _parts(path, "article", articles, "paragraphs"):
        for _, qa in _parts(place, "paragraph", [paragraph], "qas"):
            number += 1
            if not isinstance(qa, dict):
                raise DataError(f"{path}: question {number}: expected an object, found {_shown(qa)}")
            name = qa.get("id", number)
            if "question" not in qa or "context" not in paragraph:
                missing = "question" if "question" not in qa else "context"
                raise DataError(f"{path}: question {name!r}: there is no {missing}")
            answers = [] if qa.get("is_impossible") else qa.get("answers")
            place_of = f"{path}: question {name!r}"
            yield _Item(place_of, number, str(name), qa["question"], paragraph["context"], answers)


def _parts(path: str, kind: str, wholes: list[Any], key: str) -> Iterator[tuple[str, Any]]:
    """What stands in the list `key` of each, with its place."""
    for number, whole in enumerate(wholes, 1):
        place = f"{path}: {kind} {number}"
        if not isinstance(whole, dict) or not isinstance(whole.get(key), list):
            found = f"{_shown(whole)}{nearest(key, whole) if isinstance(whole, dict) else ''}"
            raise DataError(f"{place}: expected an object with a list {key!r}, found {found}")
        yield from ((place, part) for part in whole[key])


def _checked(item: _Item, need_labels: bool) -> tuple[str, str, Answers | None, int]:
    for name, value in (("question", item.question), ("context", item.context)):
        if not isinstance(value, str) or not value.strip():
            hint = "empty; set data.empty: drop to leave such questions out" if isinstance(value, str) else repr(value)
            raise DataError(f"{item.place}: the {name} is {hint}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DataError(f"{item.place}: the {name} holds half of a character (a lone surrogate)") from None
    if item.answers is None:
        if need_labels:
            raise DataError(f"{item.place}: there are no answers; a question without any has []")
        return item.question, item.context, None, item.line
    pairs = _answers(item)
    for text, start in pairs:
        if not isinstance(text, str) or type(start) is not int:
            raise DataError(f"{item.place}: an answer needs text and answer_start, found {text!r} at {start!r}")
    texts, starts = zip(*pairs, strict=True) if pairs else ((), ())
    return item.question, item.context, Answers(item.id, tuple(texts), tuple(starts)), item.line


def _answers(item: _Item) -> list[tuple[Any, Any]]:
    """Texts with their starts: of a list of objects or, as `datasets` writes them, an object of two lists."""
    given = item.answers
    if isinstance(given, dict):
        texts, starts = given.get("text"), given.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise DataError(
                f"{item.place}: answers: expected lists text and answer_start of one length, found {_shown(given)}"
            )
        return list(zip(texts, starts, strict=True))
    if not isinstance(given, list) or not all(isinstance(answer, dict) for answer in given):
        raise DataError(
            f"{item.place}: answers: expected a list of objects with text and answer_start, found {_shown(given)}"
        )
    return [(answer.get("text"), answer.get("answer_start", -1)) for answer in given]


def locate(context: str, text: str, start: int) -> int | None:
    """Where an answer stands: at `start` if it does, else the nearest place it occurs at; None for nowhere."""
    if text and context[start : start + len(text)] == text and start >= 0:
        return start
    places = [i for i in range(len(context)) if context.startswith(text, i)] if text.strip() else []
    return min(places, key=lambda i: abs(i - start), default=None)
