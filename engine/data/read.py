"""One split's rows, from a file or the hub, whole (`read_rows`, `read_file`) or one by one (`iter_texts`)."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from regraft.engine.config import DataConfig
from regraft.engine.data.cells import Cells, Table, json_cells, open_cells, parse_json_line, refuse_halves
from regraft.engine.data.gaps import TextRow, fill_or_drop
from regraft.engine.data.rows import Rows
from regraft.engine.data.source import HUB, find_source, without_mark
from regraft.engine.errors import DataError, at

if TYPE_CHECKING:
    from regraft.engine.tasks import Task

STDIN = "<stdin>"


def read_split(task: type[Task], data: DataConfig, split: str) -> Rows:
    """Rows of 'train', 'dev' or 'test' as the task reads them; `data.limit` holds for train.

    Raises DataError naming file, line and column.
    """
    path = {"train": data.train, "dev": data.dev, "test": data.test}[split]
    if path is None:
        raise DataError(f"data.{split}: not set, so there are no {split} rows")
    return task.read(path, data, split=split, limit=data.limit if split == "train" else None)


def read_rows(data: DataConfig, split: str, *, task_type: str, need_labels: bool = True) -> Rows:
    """Rows of 'train', 'dev' or 'test' as configured; `data.limit` holds for train.

    `task_type` is 'classification', 'multilabel' or 'regression': it says what a usable label looks like.
    Raises DataError naming file, line and column.
    """
    path = {"train": data.train, "dev": data.dev, "test": data.test}[split]
    if path is None:
        raise DataError(f"data.{split}: not set, so there are no {split} rows")
    limit = data.limit if split == "train" else None
    return read_file(path, data, split=split, task_type=task_type, need_labels=need_labels, limit=limit)


def read_file(
    path: str | Path,
    data: DataConfig,
    *,
    split: str,
    task_type: str,
    need_labels: bool = True,
    limit: int | None = None,
) -> Rows:
    """Rows of any file or `hub:` address, read as `data` says; at most the first `limit` that are kept.

    Without `need_labels`, a label column that is absent or has gaps gives `labels` None.
    Raises DataError naming file, line and column; also when there are no rows.
    """
    dropped: dict[str, int] = {}
    with _open(path, data, split=split, need_labels=need_labels) as table:
        kept = fill_or_drop(table.cells, str(path), data, task_type=task_type, need_labels=need_labels, dropped=dropped)
        rows = list(islice(kept, limit))
    if not rows:
        left_out = ", ".join(f"{n} {rule}" for rule, n in dropped.items())
        raise DataError(f"{path}: no rows" + (f" are left (dropped: {left_out})" if left_out else ""))
    lines, texts, pairs, labels = zip(*rows, strict=True)
    labelled = table.label and (need_labels or None not in labels)
    return Rows(
        split=split,
        path=str(path),
        texts=list(texts),
        labels=list(labels) if labelled else None,
        lines=np.array(lines, dtype=np.int64),
        pairs=None if data.columns.text_pair is None else list(pairs),
        dropped=dropped,
    )


def iter_texts(
    source: str | Path | IO[bytes] | IO[str],
    data: DataConfig,
    *,
    task_type: str | None = None,
    dropped: dict[str, int] | None = None,
) -> Iterator[TextRow]:
    """Rows of a file, a `hub:` address or an open stream, one by one in flat memory; labels only where there are some.

    A stream holds one text a line, or JSON in lines that start with `{`; a .txt file one text a line. Labels come as
    they stand in the source unless `task_type` is given. Rows left out are counted in `dropped`.
    Raises DataError naming file, line and column.
    """
    counted = {} if dropped is None else dropped
    if not isinstance(source, str | Path):
        lines = text_lines(source, data.encoding, one_text=data.columns.text_pair is None)
        yield from stream_rows(lines, data, counted, task_type)
        return
    with _open(source, data, split="test", need_labels=False, plain_text=True) as table:
        yield from fill_or_drop(table.cells, str(source), data, task_type=task_type, need_labels=False, dropped=counted)


def _open(
    path: str | Path, data: DataConfig, *, split: str, need_labels: bool, plain_text: bool = False
) -> AbstractContextManager[Table]:
    if str(path).startswith(HUB):
        from regraft.engine.data.hub import open_hub

        return open_hub(str(path), data, split=split, need_labels=need_labels)
    return open_cells(find_source(path, data, plain_text=plain_text), data, need_labels=need_labels)


def stream_lines(stream: IO[bytes] | IO[str], encoding: str) -> Iterator[tuple[int, str]]:
    """Lines of an open stream without their ends, numbered from 1. Raises DataError at what is not text."""
    for number, line in enumerate(_decoded(stream, encoding), 1):
        yield number, line.rstrip("\r\n")


def text_lines(stream: IO[bytes] | IO[str], encoding: str, *, one_text: bool) -> Iterator[tuple[int, str]]:
    """`stream_lines`, less the blank ones that are no text: among JSON objects, as in a jsonl file; and everywhere unless
    a line is `one_text`."""
    passed_over = not one_text
    for number, line in stream_lines(stream, encoding):
        if line and not line.isspace():
            passed_over = not one_text or line.startswith("{")
        elif passed_over:
            continue
        yield number, line


def with_blank_texts(data: DataConfig) -> DataConfig:
    """`data` for lines of plain text that are to be answered: what is refused among rows to learn from is an empty text
    here, unless `data.empty` leaves it out."""
    return data.model_copy(update={"empty": "keep"}) if data.empty == "error" else data


def stream_items(
    lines: Iterable[tuple[int, str]], take: Callable[[dict[str, Any]], tuple[str, Any]]
) -> Iterator[tuple[str, Any]]:
    """What a task's `take` makes of lines: JSON objects, or plain texts. Raises DataError with the line."""
    for number, line in lines:
        item = parse_json_line(line, STDIN, number) if line.startswith("{") else {"text": line}
        refuse_halves(line, item, at(STDIN, number))
        try:
            yield take(item)
        except ValueError as error:
            raise DataError(f"{at(STDIN, number)}: {error}") from None


def stream_rows(
    lines: Iterable[tuple[int, str]], data: DataConfig, dropped: dict[str, int], task_type: str | None = None
) -> Iterator[TextRow]:
    """Rows of a stream's lines, by the columns that `data` names."""
    cells = _stream_cells(lines, data)
    return fill_or_drop(cells, STDIN, data, task_type=task_type, need_labels=False, dropped=dropped)


def _stream_cells(lines: Iterable[tuple[int, str]], data: DataConfig) -> Iterator[Cells]:
    pair = data.columns.text_pair
    for number, line in lines:
        if line.startswith("{"):
            values = parse_json_line(line, STDIN, number)
            yield number, *json_cells(values, data, line, STDIN, number)
        elif pair is None:
            yield number, line, None, None
        else:
            text, tab, other = line.partition("\t")
            if not tab:
                raise DataError(f"{at(STDIN, number)}: expected a pair: two texts with a tab between, or a JSON object")
            yield number, text, other, None


def _decoded(stream: IO[bytes] | IO[str], encoding: str) -> Iterator[str]:
    if isinstance(stream, io.TextIOBase):
        yield from without_mark(stream)
        return
    line: bytes
    for number, line in enumerate(cast("IO[bytes]", stream), 1):
        try:
            text = line.decode(encoding)
        except UnicodeDecodeError as error:
            shown = f"byte 0x{line[error.start]:02x} at position {error.start + 1} of the line"
            raise DataError(f"{at(STDIN, number)}: {shown} is not {encoding}") from None
        yield text.removeprefix("\ufeff") if number == 1 else text
