"""A data set's rows in a feature store: batches gathered from mapped shards, whole arrays without a copy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from regraft.engine.features.shard import restored
from regraft.engine.features.store import FeatureStore

if TYPE_CHECKING:
    import torch
    from torch import Tensor


AHEAD, AHEAD_BYTES = 64, 16 << 20  # batches that are gathered at once, and bytes as they lie
MANY = 8192  # rows


@dataclass(frozen=True)
class FeatureBatch:
    """Features of B rows in fp32. Shape: [B, J, H]; of token features [T, J, H] or, combined, [T, H], `lengths` [B] telling
    whose."""

    features: Tensor
    lengths: Tensor | None = None

    def to(self, device: torch.device | str) -> FeatureBatch:
        lengths = None if self.lengths is None else self.lengths.to(device)
        return FeatureBatch(self.features.to(device, non_blocking=True), lengths)

    def cells(self) -> tuple[Tensor, Tensor]:
        """Token features as [B, L, ...] with zeros behind each text's end, and lengths [B]."""
        import torch

        assert self.lengths is not None
        at = torch.arange(int(self.lengths.max()), device=self.features.device)
        inside = at[None] < self.lengths[:, None]
        cells = self.features.new_zeros(*inside.shape, *self.features.shape[1:])
        cells[inside] = self.features
        return cells, self.lengths


class FeatureRows:
    """N rows of a data set, in its order, read from their store as they are needed."""

    def __init__(self, store: FeatureStore, where: np.ndarray) -> None:
        """`where` [N, 2]: shard and row of each, as `FeatureStore.find` gives them."""
        self.store, self.where = store, where
        self.pooled = store.spec.pooling != "none"
        self._order = np.empty(0, dtype=np.int64)
        self._next = self._first = 0  # in that order: of the batch that comes, and of what is held
        self._held: Tensor | None = None

    def __len__(self) -> int:
        return len(self.where)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, [N] int64."""
        found = np.empty(len(self), dtype=np.int64)
        for number in self.shards:
            mine = self.where[:, 0] == number
            found[mine] = self.store.shards[number].array("lengths")[self.where[mine, 1]]
        return found

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where each text's tokens begin when all stand one after the other, [N + 1] int64."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @cached_property
    def shards(self) -> list[int]:
        """Numbers of the shards that hold these rows."""
        return [int(n) for n in np.unique(self.where[:, 0])]

    @property
    def bytes(self) -> int:
        """Bytes on disk of these rows' features."""
        rows = len(self) if self.pooled else int(self.lengths.sum())
        return rows * self.store.spec.bytes_a_row

    def batch(self, rows: np.ndarray) -> FeatureBatch:
        """The rows, in that order, in fp32. Each shard is compared with its checksums before its first use.

        Raises StoreError naming a damaged shard.
        """
        import torch

        if self.pooled:
            found = self._foreseen(rows)
            return FeatureBatch(self._of(rows) if found is None else found)
        where = self.where[rows]
        lengths = self.lengths[rows]
        owner = np.repeat(np.arange(len(rows)), lengths)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        starts = np.empty(len(rows), dtype=np.int64)
        for number in np.unique(where[:, 0]):
            mine = where[:, 0] == number
            starts[mine] = self.store.shards[number].offsets[where[mine, 1]]
        features = self._gather(where[owner, 0], starts[owner] + within)
        return FeatureBatch(features, torch.from_numpy(lengths))

    def expect(self, order: np.ndarray) -> None:
        """Rows will be asked for in this order, batch after batch: pooled ones are then gathered for many batches at once. Others
        may be asked for all the same. What `batch` gives is then a view: not to be written to."""
        self._order, self._next, self._held = order, 0, None

    def _foreseen(self, rows: np.ndarray) -> Tensor | None:
        """The rows, where they come next in the order that was told."""
        count = len(rows)
        at = self._next
        if not count:
            return None
        if not np.array_equal(self._order[at : at + count], rows):
            found = np.flatnonzero(self._order == rows[0])
            at = int(found[0]) if len(found) else len(self._order)
            if not np.array_equal(self._order[at : at + count], rows):
                return None
        self._next = at + count
        if self._held is None or not self._first <= at <= at + count <= self._first + len(self._held):
            ahead = max(count, min(AHEAD * count, int(AHEAD_BYTES / self.store.spec.bytes_a_row)))
            self._first, self._held = at, self._of(self._order[at : at + ahead])
        return self._held[at - self._first : at - self._first + count]

    def _of(self, rows: np.ndarray) -> Tensor:
        where = self.where[rows]
        return self._gather(where[:, 0], where[:, 1])

    def _gather(self, shard: np.ndarray, row: np.ndarray) -> Tensor:
        import torch

        if len(self.shards) == 1 or not len(row):
            return self._of_shards(np.array([0, len(row)]), self.shards[:1], row)
        if len(row) > MANY:  # without a second copy of them all
            parts = self._by_shard(shard, row)
            at, first = next(parts)
            found = first.new_empty(len(row), *first.shape[1:])
            found[torch.from_numpy(at)] = first
            for at, part in parts:
                found[torch.from_numpy(at)] = part
            return found
        # Shard after shard, then into the order asked for: a handful of calls, for a step of a small head is not much longer.
        order = np.argsort(shard, kind="stable")
        where = shard[order]
        starts = np.flatnonzero(np.diff(where, prepend=-1))
        found = self._of_shards(np.append(starts, len(row)), where[starts].tolist(), row[order])
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return found.index_select(0, torch.from_numpy(back))

    def _by_shard(self, shard: np.ndarray, row: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
        for number in np.unique(shard).tolist():
            at = np.flatnonzero(shard == number)
            yield at, self._of_shards(np.array([0, len(at)]), [number], row[at])

    def _of_shards(self, bounds: np.ndarray, numbers: list[int], row: np.ndarray) -> Tensor:
        """Rows bounds[i] to bounds[i + 1] of shard numbers[i], in fp32."""
        import torch

        index = torch.from_numpy(row)
        parts: dict[str, Tensor] = {}
        for first, last, number in zip(bounds[:-1].tolist(), bounds[1:].tolist(), numbers, strict=True):
            shard = self.store.shards[number]
            shard.check()
            for name in ("features", "scales") if "scales" in shard else ("features",):
                held = shard.tensor(name)
                if name not in parts:
                    parts[name] = held.new_empty(len(row), *held.shape[1:])
                torch.index_select(held, 0, index[first:last], out=parts[name][first:last])
        return restored(parts["features"], parts.get("scales"))

    def whole(self) -> Tensor:
        """All pooled rows [N, J, H] in fp32: the mapped shard itself where it holds just these rows, else a copy."""
        first = self.shards[0]
        shard = self.store.shards[first]
        as_they_lie = len(self.shards) == 1 and len(shard) == len(self)
        if as_they_lie and np.array_equal(self.where[:, 1], np.arange(len(self))) and "scales" not in shard:
            shard.check()
            return shard.tensor().float()
        return self._gather(self.where[:, 0], self.where[:, 1])
