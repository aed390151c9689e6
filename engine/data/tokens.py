"""From rows to token ids: one flat array for a whole split, made once for each content."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from regraft.engine.data.cache import cache_folder
from regraft.engine.data.fast_tokenizer import FastTokenizer, from_transformers, load_fast_tokenizer
from regraft.engine.data.rows import Rows
from regraft.engine.data.token_file import read_arrays, write_arrays
from regraft.engine.errors import ModelError

__all__ = ["FastTokenizer", "TokenStore", "cache_folder", "encode", "load_fast_tokenizer", "tokenize"]

log = logging.getLogger(__name__)

FORMAT = 1
CHUNK = 2048  # rows handed to the tokenizer at once
Progress = Callable[[int, int], None]
# Shortens the long rows of a chunk where they stand: their numbers, the chunk's inputs, its columns of lists.
Cut = Callable[[np.ndarray, Sequence[Any], list[list[list[int]]]], None]


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
    template = tokenizer.special_tokens(pairs is not None)
    if max_length <= template:
        raise ModelError(
            f"max_length {max_length} leaves no room for text: the model adds {template} tokens of its own"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    inputs: Sequence[Any] = texts if pairs is None else list(zip(texts, pairs, strict=True))
    with_types = tokenizer.token_types and (pairs is not None or any(tokenizer.backend.encode("a").type_ids))
    cut = _text_cutter(tokenizer, max_length) if pairs is None else _pair_cutter(tokenizer, max_length)
    ids, types, lengths = [], [], []
    truncated = cut_tokens = 0
    for start in range(0, len(inputs), CHUNK):
        rows = inputs[start : start + CHUNK]
        encodings = tokenizer.backend.encode_batch_fast(rows)
        full = np.fromiter(map(len, encodings), dtype=np.int64, count=len(encodings))
        long = np.flatnonzero(full > max_length)
        truncated += len(long)
        cut_tokens += int((full[long] - max_length).sum())
        columns = [[e.ids for e in encodings]] + ([[e.type_ids for e in encodings]] if with_types else [])
        cut(long, rows, columns)
        lengths.append(np.minimum(full, max_length))
        ids.append(_flat(columns[0], np.int32))
        if with_types:
            types.append(_flat(columns[1], np.uint8))
        if progress:
            progress(start + len(rows), len(inputs))
    offsets = np.zeros(len(inputs) + 1, dtype=np.int64)
    np.cumsum(np.concatenate(lengths or [offsets[1:]]), out=offsets[1:])
    return TokenStore(
        ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
        offsets=offsets,
        types=np.concatenate(types) if types else None,
        truncated=truncated,
        cut_tokens=cut_tokens,
    )


def _text_cutter(tokenizer: FastTokenizer, max_length: int) -> Cut:
    """Cuts single texts where they stand: a second pass over long documents would double the time."""
    special = tokenizer.backend.encode("a").special_tokens_mask
    before = next((i for i, one in enumerate(special) if not one), len(special))
    after = next((i for i, one in enumerate(reversed(special)) if not one), 0)
    if before + after != tokenizer.special_tokens(pair=False):  # a template of another form
        return _pair_cutter(tokenizer, max_length)

    def cut(long: np.ndarray, rows: Sequence[Any], columns: list[list[list[int]]]) -> None:
        for column in columns:
            for i in long:
                whole = column[i]
                if tokenizer.truncation_side == "right":
                    column[i] = whole[: max_length - after] + whole[len(whole) - after :]
                else:
                    column[i] = whole[:before] + whole[len(whole) - (max_length - before) :]

    return cut


def _pair_cutter(tokenizer: FastTokenizer, max_length: int) -> Cut:
    """Lets the tokenizer itself cut, the longer of two texts first."""
    # A copy: a tokenizer in use elsewhere must not begin to cut.
    cutting = deepcopy(tokenizer.backend)
    cutting.encode_special_tokens = tokenizer.backend.encode_special_tokens
    cutting.enable_truncation(max_length, strategy="longest_first", direction=tokenizer.truncation_side)

    def cut(long: np.ndarray, rows: Sequence[Any], columns: list[list[list[int]]]) -> None:
        for i, encoding in zip(long, cutting.encode_batch_fast([rows[i] for i in long]), strict=True):
            for column, values in zip(columns, (encoding.ids, encoding.type_ids), strict=False):
                column[i] = values

    return cut


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
