"""From a file of any format to the cells of the columns in use: one stream of (line, text, pair, label).

A null is None, a key that a JSON object lacks `Absent`. Nothing is judged here beyond the file's own form.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from regraft.engine.config import DataConfig
from regraft.engine.data.delimited import Record, open_records, position_of
from regraft.engine.data.source import Source, open_bytes, open_lines
from regraft.engine.errors import DataError, at, nearest

Cells = tuple[int, Any, Any, Any]
PARQUET_ROWS = 4096  # in one piece


@dataclass(frozen=True)
class Absent:
    """A cell that is not there because the row has no such key."""

    column: str | int
    names: tuple[str, ...]

    @property
    def told(self) -> str:
        """Which keys there are instead."""
        hint = nearest(str(self.column), self.names)
        return f"is missing: there is no key {self.column!r}{hint}, only {', '.join(map(repr, self.names))}"


class Table(NamedTuple):
    """`label` tells whether the source has a label column; the last of `cells` is None where it has not."""

    cells: Iterator[Cells]
    label: bool


@contextmanager
def open_cells(source: Source, data: DataConfig, *, need_labels: bool) -> Iterator[Table]:
    """Raises DataError for a column that is not there; for the label column only where `need_labels`."""
    opener = {"jsonl": _jsonl, "csv": _delimited, "tsv": _delimited, "parquet": _parquet, "text": _text}[source.format]
    with opener(source, data, need_labels) as table:
        yield table


def parse_json_line(line: str, path: str | Path, number: int) -> dict[str, Any]:
    """The object in line `number` of `path`. Raises DataError saying what is wrong where."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{at(path, number)}: not valid JSON: {error.msg} at character {error.pos + 1}: {_around(line, error.pos)}"
        ) from None
    except RecursionError:
        raise DataError(f"{at(path, number)}: not usable JSON: nested too deeply") from None
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(value), f"a {type(value).__name__}")
        raise DataError(f'{at(path, number)}: expected an object such as {{"text": "..."}}, found {kind}')
    return value


def _around(line: str, position: int) -> str:
    piece = line.rstrip("\n")[max(0, position - 20) : position + 20]
    return repr(piece) if piece else "the line ends there"


@contextmanager
def _delimited(source: Source, data: DataConfig, need_labels: bool) -> Iterator[Table]:
    with open_records(source, data) as (header, width, records):
        place = at(source.path, 1) if header is not None else str(source)
        text, pair, label = positions(data, header, width, place, need_labels)
        yield Table(_picked(records, text, pair, label), label is not None)


def positions(
    data: DataConfig, header: Sequence[str] | None, width: int, place: str, need_labels: bool
) -> tuple[int, int | None, int | None]:
    """0-based places of the text, pair and label columns; None for those that are not used or not there."""
    text = position_of(data.columns.text, header, width, place, "text")
    pair = data.columns.text_pair
    pair = None if pair is None else position_of(pair, header, width, place, "text_pair")
    try:
        return text, pair, position_of(data.columns.label, header, width, place, "label")
    except DataError:
        if need_labels:
            raise
        return text, pair, None


def _picked(records: Iterator[Record], text: int, pair: int | None, label: int | None) -> Iterator[Cells]:
    for line, cells in records:
        yield line, cells[text], None if pair is None else cells[pair], None if label is None else cells[label]


@contextmanager
def _jsonl(source: Source, data: DataConfig, need_labels: bool) -> Iterator[Table]:
    with open_lines(source, newline="\n") as lines:
        yield Table(_json_rows(source, lines, data), True)


def _json_rows(source: Source, lines: Iterator[str], data: DataConfig) -> Iterator[Cells]:
    for column in (data.columns.text, data.columns.text_pair, data.columns.label):
        if isinstance(column, int):
            raise DataError(f"{source}: data.columns: {column} is a number; columns of a jsonl file have names")
    number = 0
    for line in lines:
        number += 1
        if line.isspace():
            continue
        if number == 1 and line.lstrip().startswith("["):
            raise DataError(f"{at(source.path, 1)}: a JSON list; expected one object a line (jsonl)")
        values = parse_json_line(line, source.path, number)
        yield number, *json_cells(values, data, line, source.path, number)


def json_cells(
    values: dict[str, Any], data: DataConfig, line: str, path: str | Path, number: int
) -> tuple[Any, Any, Any]:
    """Text, pair and label of one object, whose spelling is `line`."""
    text, pair, label = data.columns.text, data.columns.text_pair, data.columns.label
    cells = (
        values[text] if text in values else Absent(text, tuple(values)),
        None if pair is None else values[pair] if pair in values else Absent(pair, tuple(values)),
        values[label] if label in values else Absent(label, tuple(values)),
    )
    refuse_halves(line, cells, at(path, number))
    return cells


def refuse_halves(line: str, values: Any, place: str) -> None:
    """Raise DataError where a text among `values`, or in lists and objects among them, holds half of a surrogate pair.

    JSON, whose spelling is `line`, can spell that; it is no character, and nothing downstream could encode it.
    """
    if "\\ud" not in line and "\\uD" not in line:
        return
    if isinstance(values, str):
        try:
            values.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{place}: \\u{ord(values[error.start]):04x} is half of a character") from None
    for value in values.values() if isinstance(values, dict) else values if isinstance(values, list | tuple) else ():
        refuse_halves(line, value, place)


@contextmanager
def _text(source: Source, data: DataConfig, need_labels: bool) -> Iterator[Table]:
    with open_lines(source, newline="\n") as lines:
        yield Table(((n, line.rstrip("\r\n"), None, None) for n, line in enumerate(lines, 1)), False)


@contextmanager
def _parquet(source: Source, data: DataConfig, need_labels: bool) -> Iterator[Table]:
    from pyarrow import parquet

    with open_bytes(source) as stream, tempfile.TemporaryFile() as unzipped:
        if source.gzipped:
            while piece := stream.read(1 << 20):
                unzipped.write(piece)
            unzipped.seek(0)
        with telling_bad_parquet(source):
            file = parquet.ParquetFile(unzipped if source.gzipped else stream)
            names = file.schema_arrow.names
            use = use_columns(data, names, str(source), need_labels)
            pieces = file.iter_batches(batch_size=PARQUET_ROWS, columns=[c for c in use if c is not None])
            yield Table(_numbered(use, pieces), use[2] is not None)


@contextmanager
def telling_bad_parquet(source: Source) -> Iterator[None]:
    """Raise DataError where the file's content cannot be read in the block."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "strerror", None) is not None:  # a disk's fault; a damaged column has no number
            raise
        raise DataError(f"{source}: not a readable parquet file: {error}") from None


def use_columns(
    data: DataConfig, names: Sequence[str], place: str, need_labels: bool
) -> tuple[str, str | None, str | None]:
    """Names of the text, pair and label columns among `names`; None for those that are not used or not there."""
    text, pair, label = positions(data, names, len(names), place, need_labels)
    return names[text], None if pair is None else names[pair], None if label is None else names[label]


def _numbered(use: Sequence[str | None], pieces: Iterator[Any]) -> Iterator[Cells]:
    number = 0
    for piece in pieces:
        nothing = [None] * len(piece)
        columns = [nothing if c is None else piece.column(c).to_pylist() for c in use]
        for cells in zip(*columns, strict=True):
            number += 1
            yield number, *cells
