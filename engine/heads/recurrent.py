"""An LSTM that exports as ONNX's own operator, for sequences of any length.

torch's exporter unrolls an LSTM over the length it was shown. Here the graph gets one operator of ours in its place, and
`translations` says how that is written in ONNX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft.kernels.choice import choice
from regraft.kernels.lstm import lstm
from regraft.kernels.time_major import time_major

TO_ONNX = (0, 3, 1, 2)  # torch's gates are input, forget, cell, output; ONNX' are input, output, forget, cell


class Reading:
    """The cells [B, L, ..] of texts with `lengths` [B] as recurrences read them from either end, step by step, on a CPU."""

    def __init__(self, lengths: Tensor, cells: Tensor) -> None:
        counts = lengths.numpy()
        ends = np.concatenate([[0], np.cumsum(counts)])
        self.order = time_major(ends, int(ends[-1]))
        owner = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(len(owner)) - ends[owner]
        first = owner * cells.shape[1]
        self.ahead = torch.from_numpy((first + place)[self.order.rows])
        self.back = torch.from_numpy((first + counts[owner] - 1 - place)[self.order.rows])

    def states(self, own: Any, cells: Tensor, index: Tensor) -> Tensor:
        """The state of a one-layer LSTM at each cell, which it comes to in the order of `index`: `ahead` or `back`; 0 behind a
        text's end. Shape: [B, L, D] -> [B, L, hidden]."""
        bias = own.bias_ih_l0 + own.bias_hh_l0
        rows = cells.flatten(0, 1).index_select(0, index)
        found = lstm(rows, own.weight_ih_l0, own.weight_hh_l0, bias, self.order)
        return (
            found.new_zeros(cells.shape[:2].numel(), found.shape[1])
            .index_copy(0, index, found)
            .view(*cells.shape[:2], -1)
        )


def reads_rows(cells: Tensor) -> bool:
    """Whether recurrences over these cells go by `Reading`: elsewhere a device has a library for them, and under autocast torch
    casts what it needs."""
    return (
        cells.is_cpu
        and not torch.compiler.is_exporting()
        and not torch.is_autocast_enabled("cpu")
        and choice() != "reference"
    )


def read(own: Any, cells: Tensor) -> Tensor:
    """The state of a one-layer LSTM at each cell. Shape: [B, L, D] -> [B, L, hidden]."""
    if not torch.compiler.is_exporting():
        return own(cells)[0]
    weight, recurrence = (_gates(w, own.hidden_size) for w in (own.weight_ih_l0, own.weight_hh_l0))
    bias = torch.cat([_gates(b, own.hidden_size) for b in (own.bias_ih_l0, own.bias_hh_l0)])
    states = onnx_lstm(cells.transpose(0, 1), weight[None], recurrence[None], bias[None], own.hidden_size)
    return states.transpose(0, 1)


def _gates(weight: Tensor, hidden: int) -> Tensor:
    parts = weight.split(hidden)
    return torch.cat([parts[i] for i in TO_ONNX])


@torch.library.custom_op("regraft::lstm", mutates_args=())
def onnx_lstm(x: Tensor, weight: Tensor, recurrence: Tensor, bias: Tensor, hidden: int) -> Tensor:
    """ONNX' LSTM operator, forward, from zeros. Shape: [L, B, D], [1, 4H, D], [1, 4H, H], [1, 8H] -> [L, B, H]."""
    state, cell = (x.new_zeros(x.shape[1], hidden) for _ in "hc")
    inputs = x @ weight[0].T + bias[0].view(2, -1).sum(dim=0)
    found = []
    for step in inputs:
        i, o, f, c = (step + state @ recurrence[0].T).split(hidden, dim=-1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(c)
        state = torch.sigmoid(o) * torch.tanh(cell)
        found.append(state)
    return torch.stack(found)


@onnx_lstm.register_fake
def _(x: Tensor, weight: Tensor, recurrence: Tensor, bias: Tensor, hidden: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], hidden)


def translations() -> dict[Callable, Callable]:
    """What torch.onnx.export is to write for the operators of ours."""
    from onnxscript import opset20

    op: Any = opset20

    def written(x: Any, weight: Any, recurrence: Any, bias: Any, hidden: int) -> Any:
        states, _, _ = op.LSTM(x, weight, recurrence, bias, hidden_size=hidden)
        return op.Squeeze(states, op.Constant(value_ints=[1]))

    return {torch.ops.regraft.lstm.default: written}
