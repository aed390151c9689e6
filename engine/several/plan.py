"""Whose turn each step is, and with which rows: derived from (seed, step) alone, so that resuming needs no replay."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from regraft.engine.training.order import Plan

ANNEALED_TO = 0.2  # exponent in the last epoch (Stickland and Murray 2019)


@dataclass(frozen=True)
class MixedPlan(Plan):
    """Steps over rows of several tasks, each step of one.

    `sizes`: rows of each task, numbered one task after the other. An epoch has as many steps as all tasks have batches;
    a task gets a share of them by (its batches) ** exponent, and goes through its own rows in an order drawn anew each
    time they are used up. With exponent 1 an epoch is one of every task.
    """

    sizes: tuple[int, ...] = ()
    exponent: float = 1.0
    annealed: bool = False

    @property
    def batches(self) -> np.ndarray:
        """Steps that one pass over each task's rows takes, [tasks] int64."""
        return np.array([math.ceil(n / self.batch_size) for n in self.sizes], dtype=np.int64)

    @property
    def steps_per_epoch(self) -> int:
        return int(self.batches.sum())

    def turns(self, epoch: int) -> np.ndarray:
        """How many steps of an epoch each task gets, [tasks] int64: its share, rounded so that none is lost."""
        exponent = self.exponent
        last = max(1, math.ceil(self.epochs)) - 1
        if self.annealed and last:
            exponent = 1.0 - (1.0 - ANNEALED_TO) * min(epoch, last) / last
        shares = self.batches**exponent
        wanted = shares / shares.sum() * self.steps_per_epoch
        found = np.floor(wanted + 1e-9).astype(np.int64)
        most = np.argsort(found - wanted, kind="stable")
        found[most[: self.steps_per_epoch - int(found.sum())]] += 1
        return found

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers of each step of an epoch, an object array [steps_per_epoch] of int64 arrays."""
        draw = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        turns = self.turns(epoch)
        whose = draw.permutation(np.repeat(np.arange(len(turns)), turns))
        before = sum((self.turns(e) for e in range(epoch)), np.zeros(len(turns), dtype=np.int64))
        first = np.cumsum([0, *self.sizes])
        found = np.empty(len(whose), dtype=object)
        for task in range(len(turns)):
            passed, rows = -1, np.empty(0, dtype=np.int64)
            for nth, step in enumerate(np.flatnonzero(whose == task), start=int(before[task])):
                number, at = divmod(nth, int(self.batches[task]))
                if number != passed:
                    passed, rows = number, self._shuffled(task, number)
                found[step] = first[task] + rows[at * self.batch_size : (at + 1) * self.batch_size]
        return found

    def batch(self, step: int, order: np.ndarray) -> np.ndarray:
        return order[step % self.steps_per_epoch]

    def largest_steps(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Rows of the step of each task with the most tokens, and of that with the longest sequence."""
        found: dict[tuple[int, bool], tuple[int, np.ndarray]] = {}
        first = np.cumsum([0, *self.sizes])
        for epoch in range(self.epoch_of(self.total_steps - 1) + 1):
            for rows in self.order(epoch)[: self.total_steps - epoch * self.steps_per_epoch]:
                task = int(np.searchsorted(first, rows[0], side="right"))
                for longest, size in ((False, lengths[rows].sum()), (True, lengths[rows].max())):
                    if size > found.get((task, longest), (-1,))[0]:
                        found[task, longest] = (int(size), rows)
        return list({id(rows): rows for _, rows in found.values()}.values())

    def _shuffled(self, task: int, number: int) -> np.ndarray:
        seed = np.random.SeedSequence([self.seed, task, number])
        return np.random.Generator(np.random.Philox(seed)).permutation(self.sizes[task])

    def taken(self, steps: int) -> np.ndarray:
        """Steps of each task among the first `steps` of the run, [tasks] int64."""
        whole, rest = divmod(steps, self.steps_per_epoch)
        found = sum((self.turns(epoch) for epoch in range(whole)), np.zeros(len(self.sizes), dtype=np.int64))
        if rest:
            first = np.cumsum([0, *self.sizes])
            begun = np.array([rows[0] for rows in self.order(whole)[:rest]])
            found = found + np.bincount(np.searchsorted(first, begun, side="right") - 1, minlength=len(self.sizes))
        return found
