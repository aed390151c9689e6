"""A data set's rows in a feature store: batches gathered from mapped shards, whole arrays without a copy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from regraft.engine.features.shard import restored
from regraft.engine.features.store import FeatureStore

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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

        where = self.where[rows]
        if self.pooled:
            return FeatureBatch(self._gather(where[:, 0], where[:, 1]))
        lengths = self.lengths[rows]
        owner = np.repeat(np.arange(len(rows)), lengths)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        starts = np.empty(len(rows), dtype=np.int64)
        for number in np.unique(where[:, 0]):
            mine = where[:, 0] == number
            starts[mine] = self.store.shards[number].offsets[where[mine, 1]]
        features = self._gather(where[owner, 0], starts[owner] + within)
        return FeatureBatch(features, torch.from_numpy(lengths))

    def _gather(self, shard: np.ndarray, row: np.ndarray) -> Tensor:
        import torch

        present = [int(shard[0])] if len(self.shards) == 1 else [int(n) for n in np.unique(shard)]
        if len(present) == 1:
            return self._of_shard(present[0], row)
        found: Tensor | None = None
        for number in present:
            at = np.flatnonzero(shard == number)
            part = self._of_shard(number, row[at])
            if found is None:
                found = part.new_empty(len(row), *part.shape[1:])
            found[torch.from_numpy(at)] = part
        assert found is not None
        return found

    def _of_shard(self, number: int, row: np.ndarray) -> Tensor:
        import torch

        shard = self.store.shards[number]
        shard.check()
        index = torch.from_numpy(row)
        scales = shard.tensor("scales").index_select(0, index) if "scales" in shard else None
        return restored(shard.tensor().index_select(0, index), scales)

    def whole(self) -> Tensor:
        """All pooled rows [N, J, H] in fp32: the mapped shard itself where it holds just these rows, else a copy."""
        first = self.shards[0]
        shard = self.store.shards[first]
        as_they_lie = len(self.shards) == 1 and len(shard) == len(self)
        if as_they_lie and np.array_equal(self.where[:, 1], np.arange(len(self))) and "scales" not in shard:
            shard.check()
            return shard.tensor().float()
        return self._gather(self.where[:, 0], self.where[:, 1])
