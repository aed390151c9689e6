"""Train with the rows of the word embedding that the run's texts name, and no others.

A row that no text names has no gradient, so AdamW does nothing to it but decay: w <- w (1 - learning_rate decay). The
others of its pass over weights, gradients and two moments are spared: half of MiniLM's parameters on SST-2, and most of
a multilingual model's. What is saved is the whole table, with the rows that were left out decayed as they would
have been.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from regraft.engine.config import RunConfig
    from regraft.engine.examples import Examples
    from regraft.engine.models import RunningModel

WORTH_IT = 0.8  # of the rows in use, above which nothing is gained


class UsedRows:
    """The embedding of `model`, cut down to `rows` ([n], ascending token ids) until `whole` puts it together.

    `decayed`: what is left of a weight that only decays; `averaged`: the same for the averaged weights.
    """

    def __init__(self, model: nn.Module, rows: np.ndarray, ema: float | None) -> None:
        self.module = model.get_input_embeddings()  # type: ignore[operator]
        self.name = next(n for n, p in model.named_parameters() if p is self.module.weight)
        self.rows = torch.from_numpy(rows)
        self.ema = ema
        self.decayed = self.averaged = 1.0
        self._table = self.module.weight.detach()
        self._place = np.full(self._table.shape[0], -1, dtype=np.int64)
        self._place[rows] = np.arange(len(rows))
        device = self._table.device
        self.module.weight = nn.Parameter(self._table[self.rows.to(device)].clone())
        self._group = -1
        self._table = self._table.cpu()  # a GPU has better use for rows that nobody reads
        self.module.num_embeddings = len(rows)
        if self.module.padding_idx is not None:
            self.module.padding_idx = int(self._place[self.module.padding_idx])

    @property
    def left_out(self) -> int:
        """Bytes of the rows that nothing reads."""
        return (self._table.shape[0] - len(self.rows)) * self._table.shape[1] * self._table.element_size()

    def renumber(self, ids: np.ndarray) -> np.ndarray:
        """Row numbers in the small table for token ids of the whole one."""
        return self._place[ids].astype(np.int32)

    def decay_with(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's group that has the weight, before its parameters are cut up or moved."""
        groups = optimizer.param_groups
        self._group = next(i for i, g in enumerate(groups) if any(p is self.module.weight for p in g["params"]))

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Decay the rows left out as the optimizer has just decayed the others."""
        group = optimizer.param_groups[self._group]
        self.decayed *= 1.0 - group["lr"] * group["weight_decay"]
        if self.ema is not None:
            self.averaged = self.ema * self.averaged + (1.0 - self.ema) * self.decayed

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block the module holds the whole table, as it is to be saved."""
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
        """A saved model's weights, with the embedding cut down to the rows in use."""
        return weights | {self.name: weights[self.name][self.rows]}


def cut_to_rows_in_use(
    model: Any, running: RunningModel, splits: dict[str, Examples], config: RunConfig
) -> tuple[UsedRows | None, dict[str, Examples]]:
    """The model's word embedding cut down to what the splits name, and the splits in its numbers; None, and the splits
    as they are, where that gains nothing."""
    table = model.get_input_embeddings()
    own_table = type(table) is nn.Embedding and table.weight.requires_grad and not config.unfreeze.gradual
    whole = running.reads == "marked"  # a head over the vocabulary needs every row
    if config.model.kernels == "off" or not running.packed or not own_table or whole:
        return None, splits
    always = [running.pad_token_id] + ([] if table.padding_idx is None else [table.padding_idx])
    rows = rows_in_use([split.store.ids for split in splits.values()], always, table.num_embeddings)
    if len(rows) > WORTH_IT * table.num_embeddings:
        return None, splits
    used = UsedRows(model, rows, config.training.ema)
    return used, {name: split.renumbered(used.renumber(split.store.ids)) for name, split in splits.items()}


def rows_in_use(ids: Sequence[np.ndarray], always: Sequence[int], vocabulary: int) -> np.ndarray:
    """Token ids that occur in `ids`, and those in `always`; ascending, [n] int64."""
    used = np.zeros(vocabulary, dtype=bool)
    for part in ids:
        used[part] = True
    used[list(always)] = True
    return np.flatnonzero(used)
