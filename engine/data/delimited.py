"""csv and tsv: records as lists of cells, each with the line it starts in."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from regraft.engine.config import DataConfig
from regraft.engine.data.source import Source, open_lines
from regraft.engine.errors import DataError, at, nearest

Record = tuple[int, list[str]]
LONGEST_CELL = 2**31 - 1  # characters; the csv module's own limit of 131,072 is shorter than some documents


def quoting_of(source: Source, data: DataConfig) -> str:
    """'standard' or 'none'."""
    if data.quoting != "auto":
        return data.quoting
    return "standard" if source.format == "csv" else "none"


@contextmanager
def open_records(source: Source, data: DataConfig) -> Iterator[tuple[list[str] | None, int, Iterator[Record]]]:
    """The header (None where `data.header` is false), the number of columns, and the records, each that wide.

    Raises DataError at a record of another width, at a quote that is not closed or not escaped, and at an empty file.
    """
    delimiter = "," if source.format == "csv" else "\t"
    quoted = quoting_of(source, data) == "standard"
    with open_lines(source, newline="" if quoted else "\n") as lines:
        records = _quoted(source, lines, delimiter) if quoted else _plain(lines, delimiter)
        first = next((record for record in records if record[1] != [""]), None)
        if first is None:
            raise DataError(f"{source}: is empty")
        width = len(first[1])
        if data.header:
            yield first[1], width, _of_width(source, records, width, quoted)
        else:
            yield None, width, _of_width(source, _with_first(first, records), width, quoted)


def position_of(column: str | int, header: Sequence[str] | None, width: int, place: str, key: str) -> int:
    """0-based position of a column that is named, or numbered. Raises DataError naming the nearest column."""
    if isinstance(column, int):
        if not 0 <= column < width:
            raise DataError(f"{place}: no column {column} (data.columns.{key}); there are {width}, numbered from 0")
        return column
    names = list(header or [])
    if names.count(column) > 1:
        raise DataError(f"{place}: the header names {column!r} {names.count(column)} times (data.columns.{key})")
    if column not in names:
        raise no_column(column, names, place, key)
    return names.index(column)


def no_column(column: str | int, names: Sequence[str], place: str, key: str) -> DataError:
    """What to say of a column that is not there."""
    shown = ", ".join(repr(name[:40]) for name in names[:30]) + (", ..." if len(names) > 30 else "")
    return DataError(
        f"{place}: no column {column!r} (data.columns.{key}){nearest(str(column), names)}; columns: {shown}"
    )


def _plain(lines: Iterator[str], delimiter: str) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        yield number, line.rstrip("\r\n").split(delimiter)


def _quoted(source: Source, lines: Iterator[str], delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    start = 1
    try:
        for cells in reader:
            yield start, cells or [""]
            start = reader.line_num + 1
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            problem = "a quoted cell that starts in this record is never closed"
        else:
            problem = f"not a standard quoted record: {error}"
        hint = "; if quotes are plain characters here, set data.quoting: none"
        raise DataError(f"{at(source.path, start)}: {problem}{hint}") from None


def _with_first(first: Record, records: Iterator[Record]) -> Iterator[Record]:
    yield first
    yield from records


def _of_width(source: Source, records: Iterator[Record], width: int, quoted: bool) -> Iterator[Record]:
    for record in records:
        cells = record[1]
        if len(cells) != width:
            if cells == [""]:  # an empty line between records is no record
                continue
            shown = " | ".join(cell[:30] for cell in cells[:6]) + (" | ..." if len(cells) > 6 else "")
            hint = (
                "" if quoted or '"' not in "".join(cells) else "; if cells are quoted here, set data.quoting: standard"
            )
            raise DataError(f"{at(source.path, record[0])}: expected {width} fields, found {len(cells)}: {shown}{hint}")
        yield record
