"""Words of a raw text, as spans of characters: the same in training, in `predict` and in the server, whatever the
tokenizer."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

Words = tuple[tuple[int, int], ...]

# Written without spaces: each character is a word. Han, kana, Thai and its neighbours, and what surrounds them.
ALONE = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)


@lru_cache(maxsize=1)
def _pattern() -> re.Pattern[str]:
    # Marks (accents that stand alone) and format characters (zero-width joiners) belong to the word they are in.
    marks = "".join(
        re.escape(chr(c)) for c in range(0x110000) if unicodedata.category(chr(c)) in ("Mn", "Mc", "Me", "Cf")
    )
    inner = f"(?:(?![{ALONE}])[\\w{marks}])"
    return re.compile(f"[{ALONE}][{marks}]*|{inner}+|[^\\w\\s][{marks}]*")


def words_of(text: str) -> Words:
    """Runs of letters, digits and marks, and every other visible character alone; in order, without overlap."""
    return tuple(found.span() for found in _pattern().finditer(text))


def joined(words: list[str] | tuple[str, ...]) -> tuple[str, Words]:
    """Given words with a space between, and where each stands."""
    spans, end = [], -1
    for word in words:
        spans.append((end + 1, end + 1 + len(word)))
        end = spans[-1][1]
    return " ".join(words), tuple(spans)
