"""The LSTM over packed rows: states and gradients of torch's own in fp64, each sequence read alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from checking import poisoned
from regraft.kernels import lstm_native, native
from regraft.kernels.choice import forced
from regraft.kernels.lstm import lstm
from regraft.kernels.time_major import TimeMajor, time_major

LENGTHS = {
    "one token": [1],
    "one sequence": [7],
    "mixed": [3, 11, 1, 6, 11],
    "with empty ones": [0, 4, 0, 9, 1],
    "more than a piece": [5, 9, 1, 2, 9, 4, 4, 3, 8, 1, 7, 6, 2, 5, 3, 9, 1, 8, 6],
}
WIDTHS = {"narrow": (9, 5), "whole vectors": (33, 32), "panels and a half": (20, 83)}  # of a row, of a state
in_c = pytest.mark.skipif(not native.available(), reason="C kernels are not available here")
FORMS = [pytest.param("auto", marks=in_c), "reference"]


def ordered(lengths: list[int]) -> TimeMajor:
    return time_major(np.concatenate([[0], np.cumsum(lengths)]), sum(lengths))


def drawn(width: int, hidden: int) -> nn.LSTM:
    module = nn.LSTM(width, hidden, batch_first=True)
    for weight in module.parameters():
        nn.init.normal_(weight, std=1.5 / hidden**0.5)
    return module


def parameters(module: nn.LSTM) -> list[Tensor]:
    bias = module.bias_ih_l0 + module.bias_hh_l0
    return [module.weight_ih_l0, module.weight_hh_l0, bias]


def exact(module: nn.LSTM, x: Tensor, dy: Tensor, lengths: list[int]) -> list[Tensor]:
    """States and gradients of x, W, U and b, by torch in fp64."""
    module, x = copy.deepcopy(module).double(), x.double().requires_grad_()
    none = x.new_zeros(0, module.hidden_size)
    parts = [module(part[None])[0][0] if len(part) else none for part in x.split(lengths)]
    states = torch.cat(parts)
    wanted = [x, module.weight_ih_l0, module.weight_hh_l0, module.bias_ih_l0]
    found = torch.autograd.grad(states, wanted, dy.double(), allow_unused=True)
    return [states.detach(), *(torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True))]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_states_and_gradients_are_those_of_every_sequence_alone(lengths, widths, form):
    width, hidden = widths
    module, order = drawn(*widths), ordered(lengths)
    x, dy = torch.randn(sum(lengths), width), torch.randn(sum(lengths), hidden)
    index, back = torch.from_numpy(order.rows), torch.from_numpy(order.place)
    leaf = x.clone().requires_grad_()
    weight, recurrence, bias = parameters(module)
    with poisoned(), forced(form):
        states = lstm(leaf[index], weight, recurrence, bias, order)[back]
        found = torch.autograd.grad(states, [leaf, weight, recurrence, bias], dy)
    for name, one, wanted in zip("yxWUb", [states, *found], exact(module, x, dy, lengths), strict=True):
        assert one.shape == wanted.shape, name
        assert (one.detach().double() - wanted).abs().max() <= 2e-6 * max(1.0, float(wanted.abs().max())), name


@in_c
def test_the_recurrence_gives_the_same_bits_for_any_number_of_threads():
    lengths = LENGTHS["more than a piece"]
    order, recurrence = ordered(lengths), torch.randn(4 * 48, 48) * 0.2
    z, dy = torch.randn(sum(lengths), 4 * 48), torch.randn(sum(lengths), 48)

    def run() -> list[Tensor]:
        gates = z.clone()
        states, cells, curved = lstm_native.forward(gates, recurrence, order)
        return [states, gates, cells, curved, lstm_native.backward(dy, gates, cells, curved, recurrence, order)]

    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@in_c
def test_the_same_bits_for_any_number_of_threads_and_any_company(monkeypatch: pytest.MonkeyPatch):
    module, lengths = drawn(24, 40), LENGTHS["more than a piece"]
    order, x, dy = ordered(lengths), torch.randn(sum(lengths), 24), torch.randn(sum(lengths), 40)
    parts = [w.detach().requires_grad_() for w in parameters(module)]
    index, back = torch.from_numpy(order.rows), torch.from_numpy(order.place)

    def run() -> list[Tensor]:
        states = lstm(x[index], *parts, order)[back]
        return [states, *torch.autograd.grad(states, parts, dy)]

    # Ours are the threads that C is told. torch's products keep theirs: the one over all rows (dW) is rounded differently
    # by three threads than by one on some processors.
    found = []
    for threads in (1, 2, 3, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(run())
    monkeypatch.undo()
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))
    for rows, together in zip(x.split(lengths), found[0][0].split(lengths), strict=True):
        # the same product of all rows stands before both: what it rounds is torch's own
        alone = lstm(rows, *parts, ordered([len(rows)]))
        assert (alone - together).abs().max() <= 1e-6


@in_c
def test_the_recurrence_gives_a_sequence_the_same_bits_in_any_company():
    lengths = LENGTHS["more than a piece"]
    order, recurrence = ordered(lengths), torch.randn(4 * 48, 48) * 0.2
    z, dy = torch.randn(sum(lengths), 4 * 48), torch.randn(sum(lengths), 48)
    index, back = torch.from_numpy(order.rows), torch.from_numpy(order.place)

    def run(z: Tensor, dy: Tensor, order: TimeMajor) -> list[Tensor]:
        gates = z.clone()
        states, cells, curved = lstm_native.forward(gates, recurrence, order)
        return [states, cells, lstm_native.backward(dy, gates, cells, curved, recurrence, order)]

    together = [found[back].split(lengths) for found in run(z[index], dy[index], order)]
    for at, (rows, slopes) in enumerate(zip(z.split(lengths), dy.split(lengths), strict=True)):
        alone = run(rows, slopes, ordered([len(rows)]))
        assert all(torch.equal(one, found[at]) for one, found in zip(alone, together, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_gates_take_large_numbers_and_what_is_no_number_stays_in_its_sequence(form):
    order = ordered([2, 2])
    large = torch.tensor([[-1e30, 1e4, -0.0, 1e38], [1e-30, 1e-4, 0.09999, 0.1]])
    x = torch.stack([large, -large]).transpose(0, 1).reshape(4, 4)  # both sequences' first rows first
    identity = torch.eye(4).repeat(4, 1)
    with forced(form):
        states = lstm(x, identity, torch.zeros(16, 4), torch.zeros(16), order)
        lost = lstm(torch.cat([x[:1] * torch.nan, x[1:]]), identity, torch.zeros(16, 4), torch.zeros(16), order)
    cell = torch.zeros(2, 4, dtype=torch.float64)
    for step in x.double().split(2):
        gate = torch.sigmoid(step)
        cell = gate * cell + gate * torch.tanh(step)
    assert (states[2:].double() - gate * torch.tanh(cell)).abs().max() <= 2e-7
    assert lost[[0, 2]].isnan().all() and not lost[[1, 3]].isnan().any()


@in_c
def test_gates_of_infinity_are_open_or_shut():
    order, gates = ordered([1]), torch.full((1, 64), torch.inf)
    gates[:, 48:56] = -torch.inf
    states, cells, _ = lstm_native.forward(gates, torch.zeros(64, 16), order)
    assert torch.equal(cells, torch.ones(1, 16))
    wanted = torch.tanh(torch.ones(8, dtype=torch.float64))
    assert not states[0, :8].any() and (states[0, 8:].double() - wanted).abs().max() <= 2e-7


def test_no_rows_give_no_states():
    order = ordered([0, 0])
    weight = torch.randn(8, 3, requires_grad=True)
    states = lstm(torch.randn(0, 3), weight, torch.randn(8, 2), torch.randn(8), order)
    states.sum().backward()
    assert states.shape == (0, 2) and not weight.grad.any()


def test_frozen_parts_get_no_gradient():
    order = ordered([3, 2])
    weight, recurrence, bias = torch.randn(8, 3, requires_grad=True), torch.randn(8, 2), torch.randn(8)
    lstm(torch.randn(5, 3), weight, recurrence, bias, order).sum().backward()
    assert weight.grad is not None and recurrence.grad is None and bias.grad is None


def test_a_recurrence_of_other_sides_is_refused():
    order = ordered([3, 2])
    with pytest.raises(ValueError, match=r"^recurrence: is 6 x 2, expected four times"):
        lstm(torch.randn(5, 3), torch.randn(8, 3), torch.randn(6, 2), torch.randn(8), order)


@in_c
def test_other_shapes_never_come_to_c():
    order, recurrence = ordered([3, 2]), torch.zeros(64, 16)
    with pytest.raises(ValueError, match=r"^gates: shape is \[5, 60\], expected \[5, 64\]"):
        lstm_native.forward(torch.zeros(5, 60), recurrence, order)
    with pytest.raises(ValueError, match=r"^gates: shape is \[4, 64\], expected \[5, 64\]"):
        lstm_native.forward(torch.zeros(4, 64), recurrence, order)
    with pytest.raises(ValueError, match=r"^recurrence: is 5 wide, expected a multiple of 16"):
        lstm_native.forward(torch.zeros(5, 20), torch.zeros(20, 5), order)
    gates, rows = torch.zeros(5, 64), torch.zeros(5, 16)
    with pytest.raises(ValueError, match=r"^grad: strides are"):
        lstm_native.backward(torch.zeros(16, 5).T, gates, rows, rows, recurrence, order)
    with pytest.raises(TypeError, match=r"^cells: dtype is float64"):
        lstm_native.backward(rows, gates, rows.double(), rows, recurrence, order)
