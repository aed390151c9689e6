"""Packed sequences in the order of a recurrence: all first rows, then all second rows, and so on. numpy only.

Sequences are sorted by length, longest first, so that the sequences that still run at step t are always the first
`sizes[t]` of them, and a step of a recurrence over all of them is one slice, without padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class TimeMajor:
    """Rows of B packed sequences, step by step. Shape: rows [T] (packed row of each time-major row), place [T] (its
    inverse), sizes [L] (sequences that reach step t), offsets [L + 1] (first time-major row of each step), sequences [N]
    (numbers of the non-empty sequences, longest first), lengths [N] (theirs)."""

    rows: Indices
    place: Indices
    sizes: Indices
    offsets: Indices
    sequences: Indices
    lengths: Indices

    @property
    def last(self) -> Indices:
        """Time-major row of each non-empty sequence's last row, [N], in the order of `sequences`."""
        return self.offsets[self.lengths - 1] + np.arange(len(self.lengths))

    @property
    def successors(self) -> tuple[Indices, Indices]:
        """Time-major rows (i, j) such that j follows i in its sequence, [T - N] each."""
        first = int(self.sizes[0]) if len(self.sizes) else 0
        j = np.arange(first, len(self.rows))
        return j - np.repeat(self.sizes[:-1], self.sizes[1:]), j


def time_major(cu_seqlens: Indices, rows: int) -> TimeMajor:
    """The time-major order of `rows` packed rows. Raises ValueError where cu_seqlens does not cover them in order."""
    cu_seqlens = np.asarray(cu_seqlens, dtype=np.int64)
    if cu_seqlens.ndim != 1 or not len(cu_seqlens) or cu_seqlens[0] != 0 or cu_seqlens[-1] != rows:
        ends = f"{cu_seqlens[0]} to {cu_seqlens[-1]}" if cu_seqlens.size else "empty"
        raise ValueError(f"cu_seqlens: is {ends}, expected 0 to {rows}, the number of rows")
    every = np.diff(cu_seqlens)
    if (every < 0).any():
        raise ValueError(f"cu_seqlens: falls after sequence {int(np.argmax(every < 0))}, expected never to fall")
    sequences = np.argsort(-every, kind="stable")[: np.count_nonzero(every)]
    lengths = every[sequences]
    longest = int(lengths[0]) if len(lengths) else 0
    sizes = np.searchsorted(-lengths, -np.arange(longest), side="left") if longest else np.zeros(0, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    rank = np.empty(len(every), dtype=np.int64)
    rank[sequences] = np.arange(len(sequences))
    owner = np.repeat(np.arange(len(every)), every)
    place = offsets[np.arange(rows) - cu_seqlens[owner]] + rank[owner]
    inverse = np.empty(rows, dtype=np.int64)
    inverse[place] = np.arange(rows)
    return TimeMajor(inverse, place, sizes.astype(np.int64), offsets, sequences, lengths)
