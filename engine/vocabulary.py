"""Train with the rows of the word embedding that the run's texts name, and no others.

A row that no text names has no gradient, so AdamW does nothing to it but decay: w <- w (1 - learning_rate decay). The
others of its pass over weights, gradients and two moments are spared: half of MiniLM's parameters on SST-2, and most of
a multilingual model's. What is saved is the whole table, with the rows that were left out decayed as they would
have been.

Under an adapter the table is frozen and is not saved, so the rows that no text names are not even held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from regraft.engine.methods.settings import ADAPTERS, VIRTUAL

if TYPE_CHECKING:
    from regraft.engine.config import RunConfig
    from regraft.engine.examples import Examples
    from regraft.engine.models import RunningModel

WORTH_IT = 0.8  # of the rows in use, above which nothing is gained


class UsedRows:
    """The embedding of `model`, cut down to `rows` ([n], ascending token ids) until `whole` puts it together; a frozen one for
    good.

    `decayed`: what is left of a weight that only decays; `averaged`: the same for the averaged weights.
    """

    def __init__(self, model: nn.Module, rows: np.ndarray, ema: float | None) -> None:
        self.module = model.get_input_embeddings()  # type: ignore[operator]
        self.name = next(n for n, p in model.named_parameters() if p is self.module.weight)
        self.rows = torch.from_numpy(rows)
        self.ema = ema
        self.decayed = self.averaged = 1.0
        table, self.trained = self.module.weight.detach(), self.module.weight.requires_grad
        self._place = np.full(table.shape[0], -1, dtype=np.int64)
        self._place[rows] = np.arange(len(rows))
        small = table[self.rows.to(table.device)].clone()
        self.module.weight = nn.Parameter(small, requires_grad=self.trained)
        self._group = -1
        self.whole_bytes = table.numel() * table.element_size()
        # A GPU has better use for rows that nobody reads.
        self._table = table.cpu() if self.trained else None
        self.module.num_embeddings = len(rows)
        if self.module.padding_idx is not None:
            self.module.padding_idx = int(self._place[self.module.padding_idx])

    @property
    def left_out(self) -> int:
        """Bytes of the rows that nothing reads."""
        return self.whole_bytes - self.module.weight.numel() * self.module.weight.element_size()

    def renumber(self, ids: np.ndarray) -> np.ndarray:
        """Row numbers in the small table for token ids of the whole one."""
        return self._place[ids].astype(np.int32)

    def decay_with(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's group that has the weight, before its parameters are cut up or moved."""
        if not self.trained:
            return
        groups = optimizer.param_groups
        self._group = next(i for i, g in enumerate(groups) if any(p is self.module.weight for p in g["params"]))

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Decay the rows left out as the optimizer has just decayed the others."""
        if not self.trained:
            return
        group = optimizer.param_groups[self._group]
        self.decayed *= 1.0 - group["lr"] * group["weight_decay"]
        if self.ema is not None:
            self.averaged = self.ema * self.averaged + (1.0 - self.ema) * self.decayed

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block the module holds the whole table, as it is to be saved; a frozen one is not."""
        if self._table is None:
            yield
            return
        small = self.module.weight.data
        left = self.decayed if self.ema is None else self.averaged
        table = self._table * left
        table[self.rows] = small.to(table.device)
        self.module.weight.data = table
        try:
            yield
        finally:
            self.module.weight.data = small

    def cut(self, weights: dict[str, Any]) -> dict[str, Any]:
        """A saved model's weights, with the embedding cut down to the rows in use, where it is among them."""
        return weights | {self.name: weights[self.name][self.rows]} if self.name in weights else weights


def cut_to_rows_in_use(
    model: Any, running: RunningModel, splits: dict[str, Examples], config: RunConfig
) -> tuple[UsedRows | None, dict[str, Examples]]:
    """The model's word embedding cut down to what the splits name, and the splits in its numbers; None, and the splits
    as they are, where that gains nothing."""
    table = model.get_input_embeddings()
    whole = running.reads == "marked"  # a head over the vocabulary needs every row
    if config.model.kernels == "off" or not running.packed or not may_be_cut(table, config) or whole:
        return None, splits
    always = [running.pad_token_id] + ([] if table.padding_idx is None else [table.padding_idx])
    rows = rows_in_use([split.store.ids for split in splits.values()], always, table.num_embeddings)
    if len(rows) > WORTH_IT * table.num_embeddings:
        return None, splits
    used = UsedRows(model, rows, config.training.ema)
    return used, {name: split.renumbered(used.renumber(split.store.ids)) for name, split in splits.items()}


def may_be_cut(table: Any, config: RunConfig) -> bool:
    """Whether the rest of the embedding `table` is not needed before the run is over: rows that are trained are put together
    again, and those under an adapter are not saved."""
    if type(table) is not nn.Embedding or config.unfreeze.gradual:
        return False
    adapter = config.method in ADAPTERS - VIRTUAL and config.model.new_words is None
    return table.weight.requires_grad or adapter


def rows_in_use(ids: Sequence[np.ndarray], always: Sequence[int], vocabulary: int) -> np.ndarray:
    """Token ids that occur in `ids`, and those in `always`; ascending, [n] int64."""
    used = np.zeros(vocabulary, dtype=bool)
    for part in ids:
        used[part] = True
    used[list(always)] = True
    return np.flatnonzero(used)
