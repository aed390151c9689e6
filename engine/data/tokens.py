"""From rows to token ids: one flat array for a whole split, made once for each content."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from regraft.engine.data.cache import cache_folder, forget_oldest, mark_used
from regraft.engine.data.fast_tokenizer import FastTokenizer, from_transformers, load_fast_tokenizer
from regraft.engine.data.rows import Rows
from regraft.engine.data.token_file import read_arrays, write_arrays
from regraft.engine.errors import ModelError

__all__ = ["FastTokenizer", "TokenStore", "cache_folder", "encode", "load_fast_tokenizer", "tokenize"]

log = logging.getLogger(__name__)

FORMAT = 1
CHUNK = 2048  # rows handed to the tokenizer at once
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TokenStore:
    """N sequences, special tokens included: `ids` [T] int32, sequence i at `offsets[i]:offsets[i + 1]` ([N + 1] int64).

    `types` [T] uint8 are token type ids, None where all are 0. `truncated` sequences lost `cut_tokens` tokens in all.
    The arrays may be read-only and memory-mapped.
    """

    ids: np.ndarray
    offsets: np.ndarray
    types: np.ndarray | None = None
    truncated: int = 0
    cut_tokens: int = 0

    def __post_init__(self) -> None:
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.ids):
            raise ValueError(f"offsets end at {self.offsets[-1]}, but there are {len(self.ids)} ids")
        if self.types is not None and len(self.types) != len(self.ids):
            raise ValueError(f"{len(self.types)} types, but {len(self.ids)} ids")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, [N] int64."""
        return np.diff(self.offsets)

    def sequence(self, i: int) -> np.ndarray:
        """Token ids of sequence i, int32."""
        return self.ids[self.offsets[i] : self.offsets[i + 1]]


def tokenize(
    rows: Rows,
    tokenizer: Any,
    max_length: int,
    *,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """Tokens of all rows, as `tokenizer(text, pair, truncation=True, max_length=max_length)` of transformers gives.

    `tokenizer` is a FastTokenizer or a transformers fast tokenizer. What was made before of the same texts is read from
    `cache_dir` (None: `cache_folder()`). `progress` is called with (rows done, rows in all).
    Raises ModelError for a tokenizer that runs in Python, or a max_length that leaves no room for text.
    """
    fast = from_transformers(tokenizer)
    path = (cache_dir or cache_folder()) / "tokens" / f"{_content_key(rows, fast, max_length)}.tokens"
    found = read_arrays(path)
    if found is not None:
        arrays, counts = found
        mark_used(path)
        if progress:
            progress(len(rows), len(rows))
        return TokenStore(
            ids=arrays["ids"],
            offsets=arrays["offsets"],
            types=arrays.get("types"),
            truncated=counts["truncated"],
            cut_tokens=counts["cut_tokens"],
        )
    store = encode(rows.texts, rows.pairs, fast, max_length, progress=progress)
    try:
        write_arrays(
            path,
            {"offsets": store.offsets, "ids": store.ids, "types": store.types},
            {"truncated": store.truncated, "cut_tokens": store.cut_tokens},
        )
        forget_oldest(path.parent.glob("*.tokens"))
    except OSError as error:
        log.warning("%s: the tokens cannot be kept there for the next run: %s", path.parent, error)
    return store


def encode(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    tokenizer: FastTokenizer,
    max_length: int,
    *,
    progress: Progress | None = None,
) -> TokenStore:
    """Tokens of `texts` (or of texts with `pairs`), without any cache. Raises ModelError as `tokenize` does."""
    return encode_counted(texts, pairs, tokenizer, max_length, progress=progress)[0]


def encode_counted(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    tokenizer: FastTokenizer,
    max_length: int,
    *,
    progress: Progress | None = None,
) -> tuple[TokenStore, np.ndarray]:
    """As `encode`, and how many tokens of each sequence did not fit, [N] int64."""
    template = tokenizer.special_tokens(pairs is not None)
    if max_length <= template:
        raise ModelError(
            f"max_length {max_length} leaves no room for text: the model adds {template} tokens of its own"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    inputs: Sequence[Any] = texts if pairs is None else list(zip(texts, pairs, strict=True))
    with_types = tokenizer.token_types and (pairs is not None or any(tokenizer.backend.encode("a").type_ids))
    ids, types, lengths = [], [], []
    for start in range(0, len(inputs), CHUNK):
        encodings = tokenizer.backend.encode_batch_fast(inputs[start : start + CHUNK])
        full = np.fromiter(map(len, encodings), dtype=np.int64, count=len(encodings))
        long = np.flatnonzero(full > max_length)
        columns = [[e.ids for e in encodings], [e.type_ids for e in encodings] if with_types else []]
        for i in long:
            kept = _kept_slices(encodings[i].sequence_ids, max_length, tokenizer.truncation_side)
            for column in columns:
                if column:
                    column[i] = [value for piece in kept for value in column[i][piece]]
        lengths.append(full)
        ids.append(_flat(columns[0], np.int32))
        if with_types:
            types.append(_flat(columns[1], np.uint8))
        if progress:
            progress(start + len(encodings), len(inputs))
    whole = np.concatenate(lengths or [np.zeros(0, dtype=np.int64)])
    cuts = np.maximum(whole - max_length, 0)
    store = TokenStore(
        ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
        offsets=np.concatenate([[0], np.cumsum(whole - cuts)]).astype(np.int64),
        types=np.concatenate(types) if types else None,
        truncated=int((cuts > 0).sum()),
        cut_tokens=int(cuts.sum()),
    )
    return store, cuts


def _kept_slices(sequence: list[int | None], max_length: int, side: str) -> list[slice]:
    """What stays of an encoding that is too long; `sequence` tells of each token the text it is of, None for the
    template's own.

    The tokenizer's own truncation gives the same, but makes an encoding of every combination of what it cut.
    """
    sizes = [sequence.count(0), sequence.count(1)]
    kept = _longest_first(sizes[0], sizes[1], max_length - (len(sequence) - sum(sizes)))
    pieces, end = [], 0
    for text, (size, keep) in enumerate(zip(sizes, kept, strict=True)):
        if keep < size:
            first = sequence.index(text)
            pieces.append(slice(end, first + keep if side == "right" else first))
            end = first + size if side == "right" else first + size - keep
    return [*pieces, slice(end, None)]


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of each text are kept, as the tokenizers package shares the room: the shorter stays whole where
    it takes no more than half."""
    short, long = sorted((first, second))
    if short + long > room:
        if 2 * short <= room:
            long = room - short
        else:
            short, long = room // 2, room - room // 2
    return (short, long) if first <= second else (long, short)


def _flat(lists: Iterable[list[int]], dtype: type) -> np.ndarray:
    return np.fromiter(chain.from_iterable(lists), dtype=dtype)


def _content_key(rows: Rows, tokenizer: FastTokenizer, max_length: int) -> str:
    settings = [FORMAT, version("tokenizers"), tokenizer.fingerprint, tokenizer.token_types, max_length, len(rows)]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for column in (rows.texts, rows.pairs):
        if column is None:
            digest.update(b"none")
            continue
        # Lengths beside the joined texts: no two lists of texts give the same bytes.
        digest.update(np.fromiter(map(len, column), dtype="<i8", count=len(column)).tobytes())
        digest.update("\0".join(column).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
