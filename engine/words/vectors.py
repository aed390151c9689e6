"""Word vectors from the files people have: GloVe and word2vec text, fastText .vec, word2vec binary, .npz, JSON.

Every file is read once, front to back; only the words asked for, and the first `most` (the most frequent, as these
files are ordered), are kept.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from regraft.engine.errors import DataError, nearest

Entry = tuple[str, np.ndarray]
_TRAILING_COMMA = re.compile(r",\s*([}\]])")


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
    path = Path(path).expanduser()
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"words.vectors: {path}: no such file{nearest(path.name, siblings)}")
    seen: dict[str, np.ndarray] = {}
    wanted = frozenset(wanted)
    for number, (word, vector) in enumerate(_entries(path, vocabulary)):
        if (most is None or number < most or word in wanted) and word not in seen:
            seen[word] = vector
    if not seen:
        raise DataError(f"{path}: no word vectors in it")
    table = np.stack(list(seen.values())).astype(np.float32)
    if not np.isfinite(table).all():
        bad = list(seen)[int(np.flatnonzero(~np.isfinite(table).all(axis=1))[0])]
        raise DataError(f"{path}: the vector of {bad!r} holds a value that is not finite")
    return WordVectors(list(seen), table)


def _entries(path: Path, vocabulary: str | None) -> Iterator[Entry]:
    name = path.name.removesuffix(".gz").lower()
    if name.endswith(".npz"):
        return _from_npz(path, vocabulary)
    if name.endswith((".json", ".js")):
        return _from_json(path)
    if name.endswith(".bin"):
        return _from_binary(path)
    return _from_text(path)


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _from_text(path: Path) -> Iterator[Entry]:
    """GloVe has no head line; word2vec and fastText start with `words dimension`."""
    dimension = 0
    with _open(path) as file:
        for line, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8").rstrip("\r\n ")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{line}: byte 0x{raw[error.start]:02x} is not utf-8") from None
            parts = text.split(" ")
            if line == 1 and len(parts) == 2 and all(p.isdigit() for p in parts):
                dimension = int(parts[1])
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
            try:
                yield word, np.array(values, dtype=np.float32)
            except ValueError:
                odd = next(v for v in values if not _is_number(v))
                raise DataError(f"{path}:{line}: {odd!r} is not a number (word {word!r})") from None


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
        if len(head) != 2 or not all(h.isdigit() for h in head):
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
        arrays = np.load(path, allow_pickle=False)
        tables = [n for n in arrays.files if arrays[n].ndim == 2 and arrays[n].dtype.kind == "f"]
        lists = [n for n in arrays.files if arrays[n].ndim == 1 and arrays[n].dtype.kind == "U"]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as .npz: {error}") from None
    if not tables:
        raise DataError(f"{path}: expected an array [words, dimension] of numbers, found {arrays.files}")
    table = arrays[tables[0]]
    if lists and vocabulary is None:
        words = {str(word): i for i, word in enumerate(arrays[lists[0]])}
    else:
        file = Path(vocabulary).expanduser() if vocabulary else path.with_name("vocab.json")
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"words.vocabulary: {file}: the words of {path.name} cannot be read ({error}); expected JSON, a list of "
                "words or an object of word to row"
            ) from None
        words = found if isinstance(found, dict) else {word: i for i, word in enumerate(found)}
    if max(words.values(), default=-1) >= len(table):
        raise DataError(
            f"{path}: {tables[0]} has {len(table)} rows, but the vocabulary names row {max(words.values())}"
        )
    for word, row in sorted(words.items(), key=lambda item: item[1]):
        yield word, table[row].astype(np.float32)


def _from_json(path: Path) -> Iterator[Entry]:
    """`{"word": [numbers], ...}`; also as a JavaScript file that assigns such an object."""
    with _open(path) as file:
        text = file.read().decode("utf-8")
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
        try:
            yield word, np.array(values, dtype=np.float32)
        except (TypeError, ValueError):
            raise DataError(f"{path}: word {word!r}: its vector holds something that is not a number") from None
