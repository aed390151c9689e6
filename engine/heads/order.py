"""The order of rows when features are too many for memory: random in large pieces, so that a disk reads ahead."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from regraft.engine.training.order import Plan

BLOCK_BYTES = 4 << 20
BLOCKS_MIXED = 32  # rows of so many pieces are shuffled together
RANDOM_BELOW = 2 << 30  # bytes of features whose rows may come in any order: by size alone, so on every machine alike


@dataclass(frozen=True)
class BlockPlan(Plan):
    """A Plan whose epochs take pieces of `block` neighbouring rows in random order, and shuffle the rows of
    BLOCKS_MIXED pieces with one another. `places` [N]: row numbers in the order they lie on disk."""

    block: int = 1
    places: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def order(self, epoch: int) -> np.ndarray:
        draw = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        pieces = [self.places[at : at + self.block] for at in range(0, self.rows, self.block)]
        taken = [pieces[p] for p in draw.permutation(len(pieces))]
        mixed = []
        for at in range(0, len(taken), BLOCKS_MIXED):
            together = np.concatenate(taken[at : at + BLOCKS_MIXED])
            draw.shuffle(together)
            mixed.append(together)
        return np.concatenate(mixed)
