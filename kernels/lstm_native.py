"""The recurrence of an LSTM over packed sequences, and its way back, in C, on CPU (native_lstm.c).

    z_t += h_{t-1} U^T,   then gates, cells and states as lstm.py says

Shape: z [T, 4 H] in the order of time_major.py, U [4 H, H] -> h, c, tanh(c) [T, H], and z becomes the gates; back: their gradient
[T, H] -> of z before it [T, 4 H]. All fp32; H a multiple of 16. 8 T H^2 FLOPs each way.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from regraft.kernels import native
from regraft.kernels.checks import expect
from regraft.kernels.time_major import TimeMajor

SIDE = 16  # units that are at work together, or a multiple of as many


class _Recurrence(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("panels", "gates", "states", "cells", "curved", "grad", "slopes", "room", "offsets", "sizes")
        ),
        *((name, ctypes.c_int64) for name in ("steps", "wide", "each")),
    ]


def runs_here(x: Tensor, recurrence: Tensor) -> bool:
    """Whether recurrences over rows like x are computed in C."""
    return x.dtype == recurrence.dtype == torch.float32 and native.takes(x.detach(), recurrence.detach())


def padded(hidden: int) -> int:
    """How many units C computes where `hidden` are asked for; what is beyond is to be 0."""
    return -(-hidden // SIDE) * SIDE


def forward(gates: Tensor, recurrence: Tensor, order: TimeMajor) -> tuple[Tensor, Tensor, Tensor]:
    """States, cells and tanh of the cells, [T, H] each; `gates`, which come in as x W^T + b, become what they are called.

    Shape: gates [T, 4 H], recurrence [4 H, H]. Raises ValueError where one has another shape or type.
    """
    wide = recurrence.shape[1]
    _expect(recurrence, wide)
    expect("gates", gates, shape=(len(order.rows), 4 * wide), dtype=torch.float32)
    states, cells, curved = (gates.new_empty(len(gates), wide) for _ in range(3))
    if len(gates):
        _run("regraft_lstm", recurrence.t(), [gates, states, cells, curved, None, None, None], order)
    return states, cells, curved


def backward(
    grad: Tensor, gates: Tensor, cells: Tensor, curved: Tensor, recurrence: Tensor, order: TimeMajor
) -> Tensor:
    """Gradient of x W^T + b, [T, 4 H], by that of the states, [T, H], and what `forward` gave.

    Raises ValueError where one has another shape or type.
    """
    rows, wide = len(order.rows), recurrence.shape[1]
    _expect(recurrence, wide)
    expect("gates", gates, shape=(rows, 4 * wide), dtype=torch.float32)
    for name, x in (("grad", grad), ("cells", cells), ("curved", curved)):
        expect(name, x, shape=(rows, wide), dtype=torch.float32)
    slopes = torch.empty_like(gates)
    if rows:
        panel = _of_panel()
        room = gates.new_empty(int(order.sizes[0]), -(-wide // panel) * panel + wide)
        _run("regraft_lstm_backward", recurrence, [gates, None, cells, curved, grad, slopes, room], order)
    return slopes


def _expect(recurrence: Tensor, wide: int) -> None:
    # raw addresses go to C: another shape would read what is not there
    expect("recurrence", recurrence, shape=(4 * wide, wide), dtype=torch.float32, contiguous=False)
    if wide % SIDE:
        raise ValueError(f"recurrence: is {wide} wide, expected a multiple of {SIDE}")


def _run(name: str, factor: Tensor, tensors: list[Tensor | None], order: TimeMajor) -> None:
    threads, sequences = torch.get_num_threads(), int(order.sizes[0])
    pieces = -(-sequences // _most())
    pieces = -(-pieces // threads) * threads  # each thread as many
    panels = _panels(factor)
    addresses = (None if x is None else x.data_ptr() for x in (panels, *tensors))
    steps = (order.offsets.ctypes.data, order.sizes.ctypes.data, len(order.sizes))
    problem = _Recurrence(*addresses, *steps, min(factor.shape), -(-sequences // pieces))
    native.call(name, ctypes.byref(problem), threads)


def _panels(factor: Tensor) -> Tensor:
    """Columns of a factor [K, N], those of a panel together: [N / panel, K, panel], with columns of 0 to fill the last."""
    panel = _of_panel()
    filled = torch.nn.functional.pad(factor, (0, -factor.shape[1] % panel))
    return filled.view(len(factor), -1, panel).transpose(0, 1).contiguous()


@cache
def _of_panel() -> int:
    return native.call("regraft_lstm_panel", 1)


@cache
def _most() -> int:
    return native.call("regraft_lstm_most", 1)
