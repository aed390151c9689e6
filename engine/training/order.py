"""Which rows make which optimizer step: derived from (seed, epoch) alone, so that resuming needs no replay."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Steps of a run over `rows` rows; step numbers start at 0."""

    rows: int
    batch_size: int
    seed: int
    epochs: float
    max_steps: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    @property
    def total_steps(self) -> int:
        steps = max(1, math.ceil(self.epochs * self.steps_per_epoch))
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers of an epoch, [rows] int64; the same on every platform."""
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.rows)

    def batch(self, step: int, order: np.ndarray) -> np.ndarray:
        """Row numbers of a step, given its epoch's order; an epoch's last step may be smaller."""
        start = (step % self.steps_per_epoch) * self.batch_size
        return order[start : start + self.batch_size]

    def largest_steps(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Rows of the steps that could take the most memory of all that the run takes: that with the most tokens, and, if
        it is another, that with the longest sequence, which is never split. `lengths`: tokens of each row."""
        none = np.empty(0, dtype=np.int64)
        most, longest = (-1, none), (-1, none)
        for epoch in range(self.epoch_of(self.total_steps - 1) + 1):
            order = self.order(epoch)
            steps = min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)
            rows = lengths[order]
            starts = np.arange(steps) * self.batch_size
            tokens = np.add.reduceat(rows[: steps * self.batch_size], starts)
            if tokens.max() > most[0]:
                most = (tokens.max(), self.batch(int(tokens.argmax()), order))
            at = int(rows[: steps * self.batch_size].argmax())
            if rows[at] > longest[0]:
                longest = (rows[at], self.batch(at // self.batch_size, order))
        return [most[1]] if np.array_equal(most[1], longest[1]) else [most[1], longest[1]]


def share_by_tokens(lengths: np.ndarray, processes: int) -> list[np.ndarray]:
    """Split one step's rows over processes so that each gets about the same tokens: longest first, to the lightest.

    Returns positions within the step, ascending, one array a process; empty where there are fewer rows than processes.
    """
    if processes == 1:
        return [np.arange(len(lengths))]
    load = np.zeros(processes)
    owner = np.empty(len(lengths), dtype=np.int64)
    for position in np.argsort(-lengths, kind="stable"):
        lightest = int(load.argmin())
        owner[position] = lightest
        load[lightest] += lengths[position]
    return [np.flatnonzero(owner == p) for p in range(processes)]
