"""Texts of any length as token windows of a length the model takes, with every token's place in its text.

numpy and the tokenizers package alone: the server cuts texts as training did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regraft.engine.data.fast_tokenizer import FastTokenizer
from regraft.engine.data.tokens import TokenStore
from regraft.engine.errors import DataError, ModelError

SHARED = 64  # tokens that neighbouring windows share where nothing is set
AT_ONCE = 1024  # texts handed to the tokenizer together: what it makes of a text takes far more memory than we keep


@dataclass(frozen=True)
class Template:
    """What the model's tokenizer puts around one text or two. `pieces`: its own token ids before the first text,
    between the two and at the end; `types`: their token types; `text_types`: the texts'."""

    pieces: tuple[list[int], ...]
    types: tuple[list[int], ...]
    text_types: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.pieces))

    def sequence(self, *texts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids [L] int32, types [L] uint8 and, of each token, its place in the texts taken together, -1 for the model's
        own [L] int64."""
        ids: list[np.ndarray] = [np.asarray(self.pieces[0], dtype=np.int32)]
        types: list[np.ndarray] = [np.asarray(self.types[0], dtype=np.uint8)]
        places: list[np.ndarray] = [np.full(len(self.pieces[0]), -1, dtype=np.int64)]
        at = 0
        for text, kind, piece, piece_types in zip(texts, self.text_types, self.pieces[1:], self.types[1:], strict=True):
            ids += [text.astype(np.int32), np.asarray(piece, dtype=np.int32)]
            types += [np.full(len(text), kind, dtype=np.uint8), np.asarray(piece_types, dtype=np.uint8)]
            places += [np.arange(at, at + len(text), dtype=np.int64), np.full(len(piece), -1, dtype=np.int64)]
            at += len(text)
        return np.concatenate(ids), np.concatenate(types), np.concatenate(places)


def template(tokenizer: FastTokenizer, texts: int = 1) -> Template:
    """The template around one text or a pair."""
    found = tokenizer.backend.encode("a", "b" if texts == 2 else None)
    pieces: list[list[int]] = [[] for _ in range(texts + 1)]
    types: list[list[int]] = [[] for _ in range(texts + 1)]
    text_types = [0] * texts
    at = 0
    for token, kind, sequence in zip(found.ids, found.type_ids, found.sequence_ids, strict=True):
        if sequence is None:
            pieces[at].append(token)
            types[at].append(kind)
        else:
            text_types[sequence] = kind
            at = sequence + 1
    return Template(tuple(pieces), tuple(types), tuple(text_types))


@dataclass(frozen=True)
class Pieces:
    """A text's tokens without the model's own: `ids` [n] int32 and `chars` [n, 2] int64, where each stands."""

    ids: np.ndarray
    chars: np.ndarray


def pieces_of(tokenizer: FastTokenizer, texts: Sequence[str], where: Any = None) -> list[Pieces]:
    """Tokens of texts. Raises DataError at half of a character, with the place that `where(i)` names."""
    pieces: list[Pieces] = []
    try:
        for start in range(0, len(texts), AT_ONCE):
            some = list(texts[start : start + AT_ONCE])
            found = tokenizer.backend.encode_batch(some, add_special_tokens=False)
            pieces += [_trimmed(text, encoding) for text, encoding in zip(some, found, strict=True)]
    except (UnicodeEncodeError, TypeError):
        for i, text in enumerate(texts):
            if any("\ud800" <= c <= "\udfff" for c in text):
                place = f"{where(i)}: " if where else ""
                raise DataError(f"{place}the text holds half of a character (a lone surrogate)") from None
        raise
    return pieces


def _trimmed(text: str, encoding: Any) -> Pieces:
    chars = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    # Some tokenizers count the space before a word as the token's.
    for i in np.flatnonzero([s < e and text[s].isspace() for s, e in encoding.offsets]):
        start, end = chars[i]
        while start < end and text[start].isspace():
            start += 1
        chars[i, 0] = start
    return Pieces(np.asarray(encoding.ids, dtype=np.int32), chars)


def windows(tokens: int, room: int, overlap: int | None) -> list[tuple[int, int]]:
    """Windows of at most `room` tokens that share `overlap` with the next (None: SHARED, at most half), the last as long
    as the others.

    Raises ModelError where the overlap leaves no room.
    """
    if tokens <= room:
        return [(0, tokens)]
    overlap = min(SHARED, room // 2) if overlap is None else overlap
    step = room - overlap
    if step < 1:
        raise ModelError(
            f"task.stride: {overlap}; windows have {room} tokens of text, so they can share at most {room - 1}"
        )
    count = -(-(tokens - room) // step) + 1
    starts = [min(i * step, tokens - room) for i in range(count)]
    return [(start, start + room) for start in starts]


def best_window(spans: Sequence[tuple[int, int]], tokens: int) -> np.ndarray:
    """For each token the window that shows most of what is around it, [tokens] int64."""
    if len(spans) == 1:
        return np.zeros(tokens, dtype=np.int64)
    at = np.arange(tokens)
    around = np.stack([np.minimum(at - start, end - 1 - at) for start, end in spans])
    # The text's own ends hide nothing.
    around[0, : spans[0][1]] = spans[0][1] - 1 - at[: spans[0][1]]
    last = spans[-1][0]
    around[-1, last:] = at[last:] - last
    return around.argmax(axis=0)


class StoreBuilder:
    """Collects sequences, then gives them as a TokenStore."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self.with_types = tokenizer.token_types
        self.ids: list[np.ndarray] = []
        self.types: list[np.ndarray] = []

    def add(self, ids: np.ndarray, types: np.ndarray) -> None:
        self.ids.append(ids)
        self.types.append(types)

    def store(self, *, truncated: int = 0, cut_tokens: int = 0) -> TokenStore:
        offsets = np.zeros(len(self.ids) + 1, dtype=np.int64)
        np.cumsum([len(x) for x in self.ids], out=offsets[1:])
        types = _joined(self.types, np.uint8)
        used = self.with_types and bool(types.any())
        return TokenStore(_joined(self.ids, np.int32), offsets, types if used else None, truncated, cut_tokens)


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype=dtype)
