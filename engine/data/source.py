"""Where rows come from: a file of a known format, open as text, with every fault told by file and line."""

from __future__ import annotations

import codecs
import difflib
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from regraft.engine.config import DataConfig
from regraft.engine.errors import DataError, at

FORMAT_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".conll": "conll",
    ".iob": "conll",
    ".bio": "conll",
    ".conllu": "conllu",
}
HUB = "hub:"
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class Source:
    """A file that exists, and how it is to be read. `format` is jsonl, csv, tsv, parquet or text."""

    path: Path
    format: str
    encoding: str
    gzipped: bool

    def __str__(self) -> str:
        return str(self.path)


def suited_to(path: str | Path | None, data: DataConfig) -> DataConfig:
    """`data` for a file that need not be like those it was written for: an ending that tells a format is believed."""
    name = Path(str(path).lower().removesuffix(".gz"))
    told = FORMAT_OF_SUFFIX.get(name.suffix)
    if path is None or told is None or data.format in ("auto", told):
        return data
    return data.model_copy(update={"format": "auto"})


def is_plain_text(path: str | Path, data: DataConfig) -> bool:
    """Whether a file whose texts are to be answered has one text a line."""
    name = Path(str(path).lower().removesuffix(".gz"))
    return data.format == "text" or (data.format == "auto" and name.suffix == ".txt")


def find_source(path: str | Path, data: DataConfig, *, plain_text: bool = False) -> Source:
    """The file at `path`. With `plain_text`, a .txt file counts as one text a line.

    Raises DataError for a file that is not there (naming the nearest that is), or whose format cannot be told.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(_not_a_file(path))
    try:
        with path.open("rb") as stream:
            gzipped = stream.read(2) == GZIP_MAGIC
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    form = data.format if data.format != "auto" else FORMAT_OF_SUFFIX.get(name.suffix.lower())
    if form is None and plain_text and name.suffix.lower() == ".txt":
        form = "text"
    if form is None:
        raise DataError(
            f"{path}: the ending {name.suffix!r} does not tell the format; set data.format: jsonl, csv, tsv, parquet, conll or conllu"
        )
    try:
        codecs.lookup(data.encoding)
    except LookupError:
        raise DataError(
            f"data.encoding: {data.encoding!r} is not an encoding Python knows, such as utf-8 or latin-1"
        ) from None
    return Source(path, form, data.encoding, gzipped)


def _not_a_file(path: Path) -> str:
    if path.is_dir():
        return f"{path}: is a folder; expected a file of rows"
    if not path.parent.is_dir():
        return f"{path}: no such file; the folder {path.parent} does not exist either"
    names = sorted(p.name for p in path.parent.iterdir() if p.is_file())
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    if near:
        return f"{path}: no such file (did you mean {str(path.parent / near[0])!r}?)"
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{path}: no such file; {path.parent} has {shown or 'no files'}"


@contextmanager
def open_bytes(source: Source) -> Iterator[BinaryIO]:
    """The file's bytes, unzipped. A damaged gzip file raises DataError, wherever in the block it is found."""
    with gzip.open(source.path, "rb") if source.gzipped else source.path.open("rb") as stream:
        try:
            yield stream  # type: ignore[misc]
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{source}: damaged gzip file: {error}") from None


@contextmanager
def open_lines(source: Source, newline: str) -> Iterator[Iterator[str]]:
    """The file's lines with their ends; `newline` as in `open`. A byte order mark is left out.

    Bytes that are not text of the encoding, and a damaged gzip file, raise DataError.
    """
    with open_bytes(source) as raw, io.TextIOWrapper(raw, source.encoding, newline=newline) as text:
        try:
            yield without_mark(text)
        except UnicodeEncodeError:
            raise
        except UnicodeError as error:
            raise encoding_error(source, error) from None


def without_mark(text: IO[str]) -> Iterator[str]:
    """Lines of `text`, less a byte order mark before the first."""
    first = text.readline()
    if first:
        yield first.removeprefix("\ufeff")
    yield from text


def encoding_error(source: Source, error: UnicodeError) -> DataError:
    """Where the first undecodable byte of the file is, and which encoding would take it."""
    with open_bytes(source) as stream:
        content = stream.read()
    try:
        content.decode(source.encoding)
    except UnicodeDecodeError as found:
        line = content.count(b"\n", 0, found.start) + 1
        byte = found.start - (content.rfind(b"\n", 0, found.start) + 1) + 1
        shown = f"byte 0x{content[found.start]:02x} at position {byte} of the line"
        other = encoding_that_decodes(content, source.encoding)
        hint = f"; it decodes as {other}: set data.encoding: {other}" if other else ""
        return DataError(f"{at(source.path, line)}: {shown} is not {source.encoding}{hint}")
    except UnicodeError as found:
        error = found
    return DataError(f"{source}: is not {source.encoding}: {error}")


def encoding_that_decodes(content: bytes, tried: str) -> str | None:
    """A likely encoding of `content` other than the one that failed."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    high = [b for b in content if b >= 0x80] if len(content) < 1 << 20 else list(set(content) - set(range(0x80)))
    for name in ("utf-8", "gb18030", "cp1252", "latin-1"):
        if codecs.lookup(name) == codecs.lookup(tried):
            continue
        try:
            text = content.decode(name)
        except UnicodeDecodeError:
            continue
        # gb18030 takes nearly any pair of high bytes: believe it only where it gives Chinese throughout.
        if name == "gb18030" and sum("\u4e00" <= c <= "\u9fff" for c in text) < 0.2 * len(text):
            continue
        # Both of the last two take any high byte; cp1252 differs by its quotes and dashes in 0x80 to 0x9f.
        if name == "cp1252" and not any(b < 0xA0 for b in high):
            continue
        return name
    return None
