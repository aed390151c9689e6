"""An LSTM over packed sequences in time-major order: no step reads padding, and every product that can wait is one product.

    z_t = x_t W^T + h_{t-1} U^T + b,   i, f, g, o = z_t in four parts
    c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),   h_t = sigmoid(o) tanh(c_t)         (Hochreiter and Schmidhuber 1997)

Shape: x [T, D] in the order of time_major.py, W [4 H, D], U [4 H, H], b [4 H] -> h [T, H], from zeros.
x W^T, dx, dW and dU are one product each over all T rows; only h U^T, and dz U on the way back, go step by step: in C where
there is a compiler (lstm_native.py). torch's own on a CPU takes each step of a padded batch through a dozen operators, and in
the backward adds to dW and dU in every one. 8 T H (D + H) FLOPs forward, twice that back; kept for the backward: 7 numbers a
unit and row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from regraft.kernels import lstm_native
from regraft.kernels.checks import expect
from regraft.kernels.time_major import TimeMajor


class _Lstm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recurrence: Tensor, bias: Tensor, order: TimeMajor) -> Tensor:
        native = lstm_native.runs_here(x, recurrence)
        gates = torch.addmm(bias, x, weight.t())
        states, cells, curved = (lstm_native.forward if native else _forward)(gates, recurrence, order)
        ctx.save_for_backward(x, weight, recurrence, gates, states, cells, curved)
        ctx.order, ctx.native = order, native
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, recurrence, gates, states, cells, curved = ctx.saved_tensors
        back = lstm_native.backward if ctx.native else _backward
        slopes = back(grad.contiguous(), gates, cells, curved, recurrence, ctx.order)
        earlier, _ = ctx.order.successors
        wants_x, wants_weight, wants_recurrence, wants_bias, _ = ctx.needs_input_grad
        d_recurrence = None
        if wants_recurrence:
            first = int(ctx.order.sizes[0]) if len(ctx.order.sizes) else 0
            d_recurrence = slopes[first:].t() @ states[torch.from_numpy(earlier)]
        return (
            slopes @ weight if wants_x else None,
            slopes.t() @ x if wants_weight else None,
            d_recurrence,
            slopes.sum(0) if wants_bias else None,
            None,
        )


def _forward(gates: Tensor, recurrence: Tensor, order: TimeMajor) -> tuple[Tensor, Tensor, Tensor]:
    """States, cells and tanh of the cells; `gates`, which come in as x W^T + b, become what they are called."""
    hidden = recurrence.shape[1]
    states, cells, curved = (gates.new_empty(len(gates), hidden) for _ in range(3))
    turned = recurrence.t()
    before = slice(0, 0)
    for now in _steps(order):
        z, cell = gates[now], cells[now]
        count = len(z)
        if before.stop:
            z.addmm_(states[before][:count], turned)
        i, f, g, o = z.split(hidden, dim=1)
        z[:, : 2 * hidden].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        torch.mul(i, g, out=cell)
        if before.stop:
            cell.addcmul_(f, cells[before][:count])
        torch.tanh(cell, out=curved[now])
        torch.mul(o, curved[now], out=states[now])
        before = now
    return states, cells, curved


def _backward(
    grad: Tensor, gates: Tensor, cells: Tensor, curved: Tensor, recurrence: Tensor, order: TimeMajor
) -> Tensor:
    """Gradient of x W^T + b by that of the states."""
    hidden = recurrence.shape[1]
    slopes = torch.empty_like(gates)
    steps = list(_steps(order))
    d_cell = grad.new_zeros(0, hidden)  # of the rows that the next step has
    after: Tensor | None = None
    for at in range(len(steps) - 1, -1, -1):
        now = steps[at]
        i, f, g, o = gates[now].split(hidden, dim=1)
        di, df, dg, do = slopes[now].split(hidden, dim=1)
        d_state, curve = grad[now], curved[now]
        if after is not None:
            d_state = d_state.clone()
            d_state[: len(after)].addmm_(after, recurrence)
        d_here = torch.addcmul(d_state * o, d_state * o * curve, curve, value=-1)  # d_state o (1 - tanh^2)
        d_here[: len(d_cell)] += d_cell
        torch.mul(d_state * curve, _slope(o), out=do)
        torch.mul(d_here * g, _slope(i), out=di)
        torch.mul(d_here * i, torch.addcmul(g.new_ones(()), g, g, value=-1), out=dg)
        if at:
            torch.mul(d_here * cells[steps[at - 1]][: len(f)], _slope(f), out=df)
        else:
            df.zero_()
        d_cell, after = d_here * f, slopes[now]
    return slopes


def _slope(gate: Tensor) -> Tensor:
    return torch.addcmul(gate, gate, gate, value=-1)  # s (1 - s)


def _steps(order: TimeMajor) -> list[slice]:
    ends = order.offsets.tolist()
    return [slice(start, end) for start, end in zip(ends[:-1], ends[1:], strict=True)]


def lstm(x: Tensor, weight: Tensor, recurrence: Tensor, bias: Tensor, order: TimeMajor) -> Tensor:
    """States [T, H] of an LSTM over rows [T, D] in the order of `order`. Gates stand as in torch: input, forget, cell, output.

    Raises ValueError or TypeError, naming the argument.
    """
    expect("x", x, shape=(len(order.rows), None), contiguous=False)
    expect("recurrence", recurrence, shape=(None, None), dtype=x.dtype, like=x, contiguous=False)
    gates, hidden = recurrence.shape
    if gates != 4 * hidden:
        raise ValueError(f"recurrence: is {gates} x {hidden}, expected four times as many rows as columns")
    expect("weight", weight, shape=(gates, x.shape[1]), dtype=x.dtype, like=x, contiguous=False)
    expect("bias", bias, shape=(gates,), dtype=x.dtype, like=x, contiguous=False)
    with torch.autocast(x.device.type, enabled=False):  # it would cast some of the operands of a step
        spare = lstm_native.padded(hidden) - hidden if lstm_native.runs_here(x, recurrence) else 0
        if not spare:
            return _Lstm.apply(x, weight, recurrence, bias, order)
        # units of 0 weights and bias stay at 0 (as long as x is finite)
        weight = pad(weight.view(4, hidden, -1), (0, 0, 0, spare)).flatten(0, 1)
        recurrence = pad(recurrence.view(4, hidden, hidden), (0, spare, 0, spare)).flatten(0, 1)
        bias = pad(bias.view(4, hidden), (0, spare)).flatten()
        return _Lstm.apply(x, weight, recurrence, bias, order)[:, :hidden]
