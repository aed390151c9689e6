"""The LSTM over packed rows: states and gradients of torch's own in fp64, each sequence read alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from checking import poisoned
from regraft.kernels.lstm import lstm
from regraft.kernels.time_major import time_major

LENGTHS = {
    "one token": [1],
    "one sequence": [7],
    "mixed": [3, 11, 1, 6, 11],
    "with empty ones": [0, 4, 0, 9, 1],
}


def parameters(module: nn.LSTM) -> list[Tensor]:
    bias = module.bias_ih_l0 + module.bias_hh_l0
    return [module.weight_ih_l0, module.weight_hh_l0, bias]


def exact(module: nn.LSTM, x: Tensor, dy: Tensor, lengths: list[int]) -> list[Tensor]:
    """States and gradients of x, W, U and b, by torch in fp64."""
    module, x = copy.deepcopy(module).double(), x.double().requires_grad_()
    parts = [module(part[None])[0][0] if len(part) else part.new_zeros(0, 5) for part in x.split(lengths)]
    states = torch.cat(parts)
    wanted = [x, module.weight_ih_l0, module.weight_hh_l0, module.bias_ih_l0]
    found = torch.autograd.grad(states, wanted, dy.double(), allow_unused=True)
    return [states, *(torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True))]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_states_and_gradients_are_those_of_every_sequence_alone(lengths):
    module = nn.LSTM(9, 5, batch_first=True)
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.7)
    rows = sum(lengths)
    x, dy = torch.randn(rows, 9), torch.randn(rows, 5)
    order = time_major(np.concatenate([[0], np.cumsum(lengths)]), rows)
    index, back = torch.from_numpy(order.rows), torch.from_numpy(order.place)
    leaf = x.clone().requires_grad_()
    weight, recurrence, bias = parameters(module)
    with poisoned():
        states = lstm(leaf[index], weight, recurrence, bias, order)[back]
        found = torch.autograd.grad(states, [leaf, weight, recurrence, bias], dy)
    for name, one, wanted in zip("yxWUb", [states, *found], exact(module, x, dy, lengths), strict=True):
        assert one.shape == wanted.shape, name
        assert (one.detach().double() - wanted).abs().max() <= 2e-6 * max(1.0, float(wanted.abs().max())), name


def test_no_rows_give_no_states():
    order = time_major(np.array([0, 0, 0]), 0)
    weight = torch.randn(8, 3, requires_grad=True)
    states = lstm(torch.randn(0, 3), weight, torch.randn(8, 2), torch.randn(8), order)
    states.sum().backward()
    assert states.shape == (0, 2) and not weight.grad.any()


def test_frozen_parts_get_no_gradient():
    order = time_major(np.array([0, 3, 5]), 5)
    weight, recurrence, bias = torch.randn(8, 3, requires_grad=True), torch.randn(8, 2), torch.randn(8)
    lstm(torch.randn(5, 3), weight, recurrence, bias, order).sum().backward()
    assert weight.grad is not None and recurrence.grad is None and bias.grad is None


def test_a_recurrence_of_other_sides_is_refused():
    order = time_major(np.array([0, 3, 5]), 5)
    with pytest.raises(ValueError, match=r"^recurrence: is 6 x 2, expected four times"):
        lstm(torch.randn(5, 3), torch.randn(8, 3), torch.randn(6, 2), torch.randn(8), order)
