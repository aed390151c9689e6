"""What a task makes of rows: sequences for the model, what each is to give, and how much each weighs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from regraft.engine.data.rows import Rows
from regraft.engine.data.tokens import TokenStore


@dataclass(frozen=True)
class Examples:
    """S sequences made of R rows.

    `targets` [S, ...] by sequence, or [T, ...] by token for a task whose targets stand at tokens; None where the rows
    have no labels. `weights` [S] float32: what each sequence counts in the loss.
    `row_of` [S] int64, ascending: the row each sequence is of (a long text gives several windows, a question one for
    each choice); None where sequence i is row i.
    `groups` [U + 1] int64: sequences that are trained together, unit u being groups[u]:groups[u + 1]; None where every
    sequence stands alone.
    `chars` [T, 2] int32: where in its text each token stands, -1 for the model's own tokens; `words` [T] int32: the
    word each token speaks for, -1 for none. `marks` [T] bool: the tokens whose logits are wanted.
    `counts`: what a user should know of the making, by what it is (`labels`, answers that were not found).
    """

    rows: Rows
    store: TokenStore
    targets: np.ndarray | None
    weights: np.ndarray
    row_of: np.ndarray | None = None
    groups: np.ndarray | None = None
    chars: np.ndarray | None = None
    words: np.ndarray | None = None
    marks: np.ndarray | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Units: what a batch size counts and an epoch has once."""
        return len(self.store) if self.groups is None else len(self.groups) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each unit, [U] int64."""
        return self.store.lengths if self.groups is None else np.diff(self.store.offsets[self.groups])

    @property
    def unit_weights(self) -> np.ndarray:
        """Weight of each unit in the loss, [U] float32."""
        return self.weights if self.groups is None else np.add.reduceat(self.weights, self.groups[:-1])

    @property
    def row_lengths(self) -> np.ndarray:
        """Tokens of each row, [R] int64."""
        if self.row_of is None:
            return self.store.lengths
        return np.bincount(self.row_of, weights=self.store.lengths, minlength=len(self.rows)).astype(np.int64)

    @property
    def ungrouped(self) -> Examples:
        """The same with every sequence a unit of its own."""
        return replace(self, groups=None)

    def sequences(self, units: np.ndarray) -> np.ndarray:
        """The sequences of units, in their order."""
        return units if self.groups is None else _ranges(self.groups[units], self.groups[units + 1])

    def sequences_of_rows(self, rows: np.ndarray) -> np.ndarray:
        """The sequences of rows, in their order."""
        if self.row_of is None:
            return rows
        return _ranges(np.searchsorted(self.row_of, rows), np.searchsorted(self.row_of, rows, side="right"))

    def tokens(self, sequences: np.ndarray) -> np.ndarray:
        """Places of the sequences' tokens in the store's flat arrays."""
        return _ranges(self.store.offsets[sequences], self.store.offsets[sequences + 1])

    def over(self, store: TokenStore) -> Examples:
        """The same over what was made of its sequences one for one, such as their features."""
        return replace(self, store=store)

    def renumbered(self, ids: np.ndarray) -> Examples:
        """The same with other token ids, one for one."""
        return replace(self, store=replace(self.store, ids=ids))


def _ranges(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """start, start + 1, .. end - 1 of each pair, one after the other."""
    lengths = ends - starts
    if not len(lengths):
        return np.zeros(0, dtype=np.int64)
    shift = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return np.arange(int(lengths.sum()), dtype=np.int64) + shift
