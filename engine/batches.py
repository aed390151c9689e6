"""Packed batches from stored tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from regraft.engine.packing import PackedBatch, pack

if TYPE_CHECKING:
    from regraft.engine.data.tokens import TokenStore
    from regraft.engine.examples import Examples


def collate(store: TokenStore, rows: np.ndarray) -> PackedBatch:
    """The rows, in that order, as one packed batch on the host; as what it makes of them, for a store of its own kind."""
    if hasattr(store, "batch"):
        return store.batch(rows)
    spans = [slice(int(store.offsets[r]), int(store.offsets[r + 1])) for r in rows]
    types = None if store.types is None else [store.types[s] for s in spans]
    return pack([store.ids[s] for s in spans], token_types=types)


def collate_examples(examples: Examples, sequences: np.ndarray) -> PackedBatch:
    """The sequences as one packed batch, with the rows that are marked."""
    batch = collate(examples.store, sequences)
    if examples.marks is None:
        return batch
    return replace(batch, marks=torch.from_numpy(np.flatnonzero(examples.marks[examples.tokens(sequences)])))


def by_length(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Row numbers of inference batches of at most `budget` tokens, each of rows of like length, the longest first (so
    that what would run out of memory does so at once)."""
    order = np.argsort(-lengths, kind="stable")
    batches: list[np.ndarray] = []
    start = total = 0
    for at, row in enumerate(order):
        if at > start and total + lengths[row] > budget:
            batches.append(order[start:at])
            start, total = at, 0
        total += int(lengths[row])
    if start < len(order):
        batches.append(order[start:])
    return batches
