"""Rows of one split, column by column, each knowing the file and line it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from regraft.engine.errors import at


@dataclass(frozen=True)
class Rows:
    """N rows: `texts` [N], `pairs` [N] or None (second texts, or what else a task takes beside a text: words, choices), raw `labels` [N] (str, int, float, or a list of str/int for
    multilabel) or None when the source has none.

    `lines` [N] int64 are 1-based lines of `path` (row numbers for parquet and hub datasets); `dropped` counts rows
    left out by a rule the user chose, by rule. `scheme`: how the source spells spans, where it has tags of words. `carved`: `path` holds other
    rows too, which training learned from.
    """

    split: str
    path: str
    texts: Sequence[str]
    labels: Sequence[Any] | None
    lines: np.ndarray
    pairs: Sequence[Any] | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    scheme: str | None = None
    carved: bool = False

    def __post_init__(self) -> None:
        n = len(self.texts)
        for name in ("labels", "pairs", "lines"):
            column = getattr(self, name)
            if column is not None and len(column) != n:
                raise ValueError(f"{self.split}: {n} texts but {len(column)} {name}")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def told(self) -> str:
        """Where the rows are from, for a person who compares figures."""
        return f"{self.path} ({self.split} rows carved from it)" if self.carved else self.path

    def where(self, index: int, column: str | int | None = None) -> str:
        """`file:line, column 'x'` of row `index`, for an error message."""
        return at(self.path, int(self.lines[index]), column)

    def take(self, index: np.ndarray, *, split: str | None = None, dropped: dict[str, int] | None = None) -> Rows:
        """The rows at `index`, in that order."""
        pick = lambda column: None if column is None else [column[i] for i in index]  # noqa: E731
        return replace(
            self,
            split=split or self.split,
            texts=pick(self.texts) or [],
            labels=pick(self.labels),
            lines=self.lines[index],
            pairs=pick(self.pairs),
            dropped=self.dropped if dropped is None else dropped,
        )
