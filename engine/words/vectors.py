"""Word vectors from the files people have: GloVe and word2vec text, fastText .vec, word2vec binary, .npz, JSON.

Every file is read front to back; only the words asked for, and the first `most` (the most frequent, as these files are
ordered), are kept.
"""

from __future__ import annotations

import gzip
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np

from regraft.engine.errors import DataError, nearest

Entry = tuple[str, np.ndarray | None]  # None: not asked for, and not read
Kept = Callable[[int, str], bool]
_TRAILING_COMMA = re.compile(r",\s*([}\]])")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class WordVectors:
    """`table` [N, D] float32, row i of `words[i]`."""

    words: list[str]
    table: np.ndarray

    @property
    def dimension(self) -> int:
        return self.table.shape[1]


def read_vectors(
    path: str | Path, *, vocabulary: str | None = None, wanted: Collection[str] = (), most: int | None = None
) -> WordVectors:
    """The vectors of `wanted` words and of the first `most` words (None: all).

    Raises DataError naming file, line and what was expected there.
    """
    path, seen, wanted = _found(path), {}, frozenset(wanted)

    def kept(number: int, word: str) -> bool:
        return most is None or number < most or word in wanted

    for number, (word, vector) in enumerate(_entries(path, vocabulary, kept)):
        if vector is not None and word not in seen and kept(number, word):
            seen[word] = vector
    if not seen:
        raise DataError(f"{path}: no word vectors in it")
    table = np.stack(list(seen.values())).astype(np.float32)
    if not np.isfinite(table).all():
        bad = list(seen)[int(np.flatnonzero(~np.isfinite(table).all(axis=1))[0])]
        raise DataError(f"{path}: the vector of {bad!r} holds a value that is not finite")
    return WordVectors(list(seen), table)


def read_words(path: str | Path, *, vocabulary: str | None = None, most: int | None = None) -> Iterator[str]:
    """The first `most` words of such a file (None: all), in its order. Raises DataError."""
    return (word for word, _ in islice(_entries(_found(path), vocabulary, lambda number, word: False), most))


def _found(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"words.vectors: {path}: no such file{nearest(path.name, siblings)}")
    return path


def _entries(path: Path, vocabulary: str | None, kept: Kept) -> Iterator[Entry]:
    name = path.name.removesuffix(".gz").lower()
    try:
        if name.endswith(".npz"):
            yield from _from_npz(path, vocabulary)
        elif name.endswith((".json", ".js")):
            yield from _from_json(path)
        elif name.endswith(".bin"):
            yield from _from_binary(path)
        else:
            yield from _from_text(path, kept)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cut off or damaged ({error}); copy it again") from None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _from_text(path: Path, kept: Kept) -> Iterator[Entry]:
    """GloVe has no head line; word2vec and fastText start with `words dimension`."""
    dimension, said, number = 0, None, 0
    with _open(path) as file:
        for line, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8").rstrip("\r\n ")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{line}: byte 0x{raw[error.start]:02x} is not utf-8") from None
            parts = text.split(" ")
            if line == 1 and len(parts) == 2 and all(p.isdecimal() for p in parts):
                said, dimension = map(int, parts)
                continue
            if not text:
                continue
            dimension = dimension or len(parts) - 1
            # A word may itself hold spaces (GloVe 840B has some): the numbers are the last `dimension` parts.
            word, values = " ".join(parts[: len(parts) - dimension]), parts[len(parts) - dimension :]
            if not word or dimension < 1 or len(parts) <= dimension:
                raise DataError(
                    f"{path}:{line}: expected a word and {dimension} numbers, found {len(parts) - 1} numbers; the file is "
                    "cut off or its first line belongs to another file"
                )
            surplus = parts[1 : len(parts) - dimension]
            if surplus and any(_is_value(part, values) for part in surplus):
                raise DataError(
                    f"{path}:{line}: expected a word and {dimension} numbers, found more: {text[:60]!r}; the line is broken, "
                    f"or the file's vectors have not the {dimension} numbers that its first line says"
                )
            try:
                yield word, np.array(values, dtype=np.float32) if kept(number, word) else None
            except ValueError:
                odd = next(v for v in values if not _is_number(v))
                raise DataError(f"{path}:{line}: {odd!r} is not a number (word {word!r})") from None
            number += 1
    if said not in (None, number):
        raise DataError(
            f"{path}: its first line says {said:,} words, but {number:,} follow; the file is cut off: copy it again, or "
            "write there how many it has"
        )


def _is_value(part: str, values: list[str]) -> bool:
    """Whether a part of what stands before the numbers is a number of the same kind; 'windows 95' is a word."""
    if not _NUMBER.fullmatch(part):
        return False
    return not part.isdecimal() or all(v.lstrip("-").isdecimal() for v in values)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _from_binary(path: Path) -> Iterator[Entry]:
    """word2vec's own format: a head line `words dimension`, then word, a space, float32s, perhaps a line end."""
    with _open(path) as file:
        head = file.readline(64).split()
        if len(head) != 2 or not all(h.isdigit() for h in head) or not int(head[1]):
            raise DataError(f"{path}:1: expected `words dimension` in text, found {head[:3]}; not a word2vec .bin file")
        count, dimension = map(int, head)
        for number in range(count):
            word = bytearray()
            while (character := file.read(1)) not in (b" ", b""):
                if character != b"\n":
                    word += character
            values = file.read(4 * dimension)
            if len(values) < 4 * dimension:
                raise DataError(f"{path}: ends in word {number + 1} of {count}; the file is cut off, copy it again")
            yield word.decode("utf-8", errors="replace"), np.frombuffer(values, dtype="<f4")


def _from_npz(path: Path, vocabulary: str | None) -> Iterator[Entry]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read as .npz: {error}") from None
    tables = [n for n, array in found.items() if array.ndim == 2 and array.dtype.kind == "f"]
    lists = [n for n, array in found.items() if array.ndim == 1 and array.dtype.kind == "U"]
    if not tables:
        raise DataError(f"{path}: expected an array [words, dimension] of numbers, found {list(found)}")
    table = found[tables[0]]
    if lists and vocabulary is None:
        words = {str(word): i for i, word in enumerate(found[lists[0]])}
    else:
        words = _vocabulary(Path(vocabulary).expanduser() if vocabulary else path.with_name("vocab.json"), path)
    if max(words.values(), default=-1) >= len(table):
        raise DataError(
            f"{path}: {tables[0]} has {len(table)} rows, but the vocabulary names row {max(words.values())}"
        )
    for word, row in sorted(words.items(), key=lambda item: item[1]):
        yield word, table[row].astype(np.float32)


def _vocabulary(file: Path, path: Path) -> dict[str, int]:
    """Word to row of the table in `path`."""
    expected = "expected JSON, a list of words or an object of word to row"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"words.vocabulary: {file}: the words of {path.name} cannot be read ({error}); {expected}"
        ) from None
    if isinstance(found, list):
        odd = next((word for word in found if not isinstance(word, str)), None)
        if odd is not None:
            raise DataError(f"words.vocabulary: {file}: {odd!r} is no word; {expected}")
        return {word: i for i, word in enumerate(found)}
    if not isinstance(found, dict):
        raise DataError(f"words.vocabulary: {file}: {type(found).__name__}; {expected}")
    for word, row in found.items():
        if type(row) is not int or row < 0:
            raise DataError(f"words.vocabulary: {file}: word {word!r}: {row!r} is no row; expected a number from 0")
    return found


def _from_json(path: Path) -> Iterator[Entry]:
    """`{"word": [numbers], ...}`; also as a JavaScript file that assigns such an object."""
    with _open(path) as file:
        raw = file.read()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: byte 0x{raw[error.start]:02x} is not utf-8") from None
    start, end = text.find("{"), text.rfind("}")
    try:
        found = json.loads(_TRAILING_COMMA.sub(r"\1", text[start : end + 1]))
    except ValueError as error:
        raise DataError(f"{path}: not a JSON object of word to numbers: {error}") from None
    dimension = None
    for word, values in found.items():
        dimension = dimension or (len(values) if isinstance(values, list) else 0)
        if not isinstance(values, list) or len(values) != dimension or not dimension:
            size = len(values) if isinstance(values, list) else type(values).__name__
            raise DataError(f"{path}: word {word!r}: expected {dimension} numbers, found {size}")
        if not all(type(value) in (int, float) for value in values):
            odd = next(value for value in values if type(value) not in (int, float))
            raise DataError(f"{path}: word {word!r}: {odd!r} in its vector is not a number")
        try:
            yield word, np.array(values, dtype=np.float32)
        except OverflowError:
            raise DataError(f"{path}: word {word!r}: its vector holds a number that is too large") from None
