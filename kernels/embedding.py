"""Word embedding whose gradient touches only the rows that were read.

    grad[id] = sum of the output's gradient over the tokens with that id

Shape: ids [T] or [1, T], weight [V, H] -> [.., H]. torch fills V x H zeros in every backward (47 MB for MiniLM, of
which 430 tokens touch 0.7 MB), and every pass over the gradients reads them again. Here one buffer stays as the
weight's gradient; a step adds to the rows it read, and `clear` zeroes those rows alone. What the optimizer sees is
the same dense gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.kernels.checks import INTEGERS, expect


class RowGradient:
    """The gradient buffer of one embedding weight, and the rows in it that are not zero."""

    def __init__(self, weight: Tensor, padding_idx: int | None = None) -> None:
        self.weight = weight
        self.padding_idx = padding_idx
        self.buffer = torch.zeros_like(weight)
        self._read: list[Tensor] = []
        self._whole = False

    def add(self, ids: Tensor, grad: Tensor) -> None:
        """Add the gradient of the rows `ids` [T], grad [T, H]."""
        if self.padding_idx is not None:
            grad = grad * (ids != self.padding_idx)[:, None]
        self.buffer.index_add_(0, ids, grad)
        self._read.append(ids)
        self.weight.grad = self.buffer

    def rows(self) -> Tensor:
        """The gradient's rows that may differ from zero, [n, H]."""
        return self.own()[1]

    def own(self) -> tuple[Tensor, Tensor]:
        """Which rows may differ from zero, [n] int64, and those, [n, H]."""
        touched = self._touched()
        return touched, self.buffer.index_select(0, touched)

    def written(self) -> None:
        """Any row of the gradient may differ from zero: something else has written it."""
        self._whole = True

    def clear(self) -> None:
        """Zero the gradient; costs the rows that were read."""
        if self._whole:
            self.buffer.zero_()
        elif self._read:
            self.buffer.index_fill_(0, self._touched(), 0.0)
        self._read.clear()
        self._whole = False
        self.weight.grad = None

    def _touched(self) -> Tensor:
        if self._whole:
            return torch.arange(len(self.buffer), device=self.buffer.device)
        return torch.unique(torch.cat(self._read)).long() if self._read else torch.empty(0, dtype=torch.int64)


class _RowEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, gradient: RowGradient) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.gradient = gradient
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        ctx.gradient.add(ids.reshape(-1), grad.reshape(-1, grad.shape[-1]))
        return None, None, None


def row_embedding(ids: Tensor, gradient: RowGradient) -> Tensor:
    """Rows `ids` of the weight; their gradient goes to `gradient` instead of through autograd. Raises ValueError or TypeError,
    naming the argument."""
    expect("ids", ids, dtype=INTEGERS, like=gradient.weight, contiguous=False)
    return _RowEmbedding.apply(ids, gradient.weight, gradient)
