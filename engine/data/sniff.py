"""How a file that nobody has described is written: format, encoding, quoting, header; and its first rows."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from regraft.engine.config import DataConfig
from regraft.engine.data.cells import telling_bad_parquet
from regraft.engine.data.column_names import HEADER_WORDS
from regraft.engine.data.delimited import LONGEST_CELL
from regraft.engine.data.source import (
    FORMAT_OF_SUFFIX,
    HUB,
    Source,
    encoding_that_decodes,
    find_source,
    open_bytes,
)
from regraft.engine.errors import DataError

SAMPLE = 2000  # rows looked at
HEAD = 4 << 20  # bytes read to find them


@dataclass(frozen=True)
class Sniffed:
    """`settings`: keys of the data section that differ from their defaults. `columns`: for each column, by header name
    or number, its values in the first rows."""

    format: str
    settings: dict[str, Any]
    columns: dict[str | int, list[Any]]


def sniff(path: str) -> Sniffed:
    """Look at the first rows. Raises DataError where they cannot be read at all."""
    if path.startswith(HUB):
        from regraft.engine.data.hub import first_rows

        return Sniffed("hub", {}, first_rows(path, SAMPLE))
    # Any format does here: the ending is judged below, together with the content.
    source = find_source(path, DataConfig(train=path, format="jsonl"))
    name = Path(path[: -len(".gz")] if path.lower().endswith(".gz") else path)
    known = FORMAT_OF_SUFFIX.get(name.suffix.lower())
    if known == "parquet":
        return Sniffed("parquet", {}, _parquet(source))
    settings: dict[str, Any] = {}
    head = _head(source, settings)
    form = known or _format_of(head)
    if known is None:
        settings["format"] = form
    if form == "jsonl":
        return Sniffed(form, settings, _jsonl(head, path))
    return Sniffed(form, settings, _delimited(head, form, settings, path))


def _head(source: Source, settings: dict[str, Any]) -> str:
    with open_bytes(source) as stream:
        content = stream.read(HEAD)
        more = stream.read(1)
    if more:
        content = content[: content.rfind(b"\n") + 1]
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        settings["encoding"] = encoding_that_decodes(content, "utf-8") or "latin-1"
        text = content.decode(settings["encoding"], errors="replace")
    if not text.strip():
        raise DataError(f"{source}: is empty")
    return text.removeprefix("\ufeff")


def _format_of(head: str) -> str:
    if head.lstrip().startswith("{"):
        return "jsonl"
    uneven = {}
    for form in ("tsv", "csv"):
        rows, _ = _records(head, form)
        uneven[form] = _unevenness(rows) if _width(rows) > 1 else 1.0
    return min(uneven, key=lambda form: uneven[form])


def _jsonl(head: str, path: str) -> dict[str | int, list[Any]]:
    columns: dict[str | int, list[Any]] = {}
    for number, line in enumerate(islice((x for x in head.split("\n") if x.strip()), SAMPLE)):
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise DataError(f"{path}: expected one JSON object a line, found {line[:60]!r}")
        for name, value in values.items():
            columns.setdefault(name, [None] * number).append(value)
        for column in columns.values():
            column.extend([None] * (number + 1 - len(column)))
    return columns


def _delimited(head: str, form: str, settings: dict[str, Any], path: str) -> dict[str | int, list[Any]]:
    rows, quoting = _records(head, form)
    if quoting != ("standard" if form == "csv" else "none"):
        settings["quoting"] = quoting
    width = _width(rows)
    if width == 1:
        raise DataError(f"{path}: has one column only as {form}; expected at least a text and a label")
    rows = [row for row in rows if len(row) == width]
    if not _has_header(rows):
        settings["header"] = False
        return {i: [row[i] for row in rows] for i in range(width)}
    return {name: [row[i] for row in rows[1:]] for i, name in enumerate(rows[0])}


def _records(head: str, form: str) -> tuple[list[list[str]], str]:
    """The first records, and the quoting that makes them: 'standard' or 'none'."""
    delimiter = "," if form == "csv" else "\t"
    plain = [line.rstrip("\r").split(delimiter) for line in islice(head.split("\n"), SAMPLE) if line.strip()]
    # In a tsv quotes are believed only where plain reading does not make every row as wide as the next.
    if form == "tsv" and _unevenness(plain) == 0:
        return plain, "none"
    quoted = _quoted(head, delimiter)
    if quoted and _unevenness(quoted) <= _unevenness(plain):
        return quoted, "standard"
    return plain, "none"


def _quoted(head: str, delimiter: str) -> list[list[str]]:
    csv.field_size_limit(LONGEST_CELL)
    rows: list[list[str]] = []
    try:
        for row in islice(csv.reader(io.StringIO(head, newline=""), delimiter=delimiter, strict=True), SAMPLE):
            if row:
                rows.append(row)
    except csv.Error:
        # The last record of a cut head may be open; an early fault means that these are not quotes.
        return rows if len(rows) > 100 else []
    return rows


def _width(rows: list[list[str]]) -> int:
    return Counter(map(len, rows)).most_common(1)[0][0]


def _unevenness(rows: list[list[str]]) -> float:
    widths = Counter(map(len, rows))
    return 1 - widths.most_common(1)[0][1] / len(rows)


def _has_header(rows: list[list[str]]) -> bool:
    first, rest = rows[0], rows[1:]
    if any(cell.strip().lower() in HEADER_WORDS for cell in first):
        return True
    if len(set(first)) < len(first) or any(not cell.strip() for cell in first) or not rest:
        return False
    for i, cell in enumerate(first):
        values = [row[i] for row in rest]
        if is_number(cell) or len(cell.split()) > 4:
            return False
        if cell in set(values) and len(set(values)) < len(values) / 2:  # a label like others below
            return False
    return True


def is_number(value: Any) -> bool:
    """Whether a cell is a number, or spells one."""
    if isinstance(value, bool):
        return False
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _parquet(source: Source) -> dict[str | int, list[Any]]:
    from pyarrow import parquet

    with open_bytes(source) as stream, telling_bad_parquet(source):
        file = parquet.ParquetFile(io.BytesIO(stream.read()) if source.gzipped else stream)
        piece = next(file.iter_batches(batch_size=SAMPLE), None)
    if piece is None:
        raise DataError(f"{source}: is empty")
    return {name: piece.column(name).to_pylist() for name in piece.schema.names}
