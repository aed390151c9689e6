"""Texts to token ids, with what was cut counted. Needs the `tokenizers` package only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regraft.engine.errors import BundleError


@dataclass(frozen=True, eq=False)
class Encoded:
    """One text or pair as the model takes it.

    Shape: ids [L] int64, types [L] int64 (0 for the first text, 1 for the second). `truncated` tokens were cut off.
    `problem` says why there are no tokens, where there are none. `marks` [M]: places whose logits are wanted, for a
    head that reads marked tokens. `adapter`: which of a bundle's adapters answers it.
    """

    ids: np.ndarray
    types: np.ndarray
    truncated: int = 0
    problem: str | None = None
    marks: np.ndarray | None = None
    adapter: int = 0

    @property
    def tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Prepared:
    """Inputs of a request as items for the model. An input may take several items, as a long text in windows does.

    `items`: every input's, in order; `owners` [len(items)]: the input each is of; `problems`: why an input has none.
    `examples`: the sequences of the inputs without a problem, for a task that needs more than logits to answer.
    """

    inputs: int
    items: list[Encoded]
    owners: list[int]
    problems: dict[int, str]
    examples: Any = None

    def of(self, number: int) -> list[int]:
        """Places in `items` of one input's."""
        return [i for i, owner in enumerate(self.owners) if owner == number]


class TextEncoder:
    """A bundle's tokenizer. Safe to use from several threads: nothing is switched on or off after loading."""

    def __init__(self, path: Path, max_length: int) -> None:
        from tokenizers import Tokenizer

        try:
            self._whole = Tokenizer.from_file(str(path))
            self._cutting = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise BundleError(f"{path}: not a tokenizer file: {error}") from None
        kept = {k: v for k, v in (self._cutting.truncation or {}).items() if k in ("strategy", "direction")}
        self._whole.no_truncation()
        self._whole.no_padding()
        self._cutting.no_padding()
        self._cutting.enable_truncation(max_length, **kept)
        self._special = {pair: self._whole.num_special_tokens_to_add(pair) for pair in (False, True)}

    def encode(self, texts: Sequence[str], pairs: Sequence[str | None] | None = None) -> list[Encoded]:
        """Encode texts, each alone or with its pair, to at most `max_length` tokens each.

        A text that cannot be read has a `problem` and no tokens; the others are not touched by it.
        """
        seconds = [None] * len(texts) if pairs is None else list(pairs)
        if len(seconds) != len(texts):
            raise ValueError(f"{len(texts)} texts but {len(seconds)} pairs")
        bad = {i for i, pair in enumerate(zip(texts, seconds, strict=True)) if not all(map(is_unicode, pair))}
        if bad:
            texts = ["" if i in bad else text for i, text in enumerate(texts)]
            seconds = [None if i in bad else second for i, second in enumerate(seconds)]
        # Everything goes through one call without truncation, so that what is then cut can be counted.
        flat = [*texts, *(second for second in seconds if second is not None)]
        pieces = self._whole.encode_batch_fast(flat, add_special_tokens=False)
        rest = iter(pieces[len(texts) :])
        firsts = pieces[: len(texts)]
        encoded = [
            self._join(first, None if second is None else next(rest))
            for first, second in zip(firsts, seconds, strict=True)
        ]
        return [NOT_UNICODE if i in bad else item for i, item in enumerate(encoded)]

    def _join(self, first: Any, second: Any | None) -> Encoded:
        whole = len(first) + (len(second) if second is not None else 0) + self._special[second is not None]
        joined = self._cutting.post_process(first, second)
        ids = np.array(joined.ids, dtype=np.int64)
        types = np.array(joined.type_ids, dtype=np.int64)
        return Encoded(ids, types, whole - len(ids), None if len(ids) else "the text has no tokens")


_NOTHING = np.zeros(0, dtype=np.int64)
NOT_UNICODE = Encoded(_NOTHING, _NOTHING, problem="the text is not valid Unicode: it holds half of a surrogate pair")


def is_unicode(text: str | None) -> bool:
    """JSON can spell half of a surrogate pair; UTF-8 and the tokenizer cannot."""
    if text is None or text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
