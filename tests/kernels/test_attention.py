"""Packed attention against a plain fp64 computation, sequence by sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from checking import Measured, attention_by_sequence, hold_over_draws
from regraft.kernels.attention import first_row_attention, plan_groups, plan_layout
from regraft.kernels.attention import packed_attention as attention_of_merged
from regraft.kernels.choice import forced
from regraft.kernels.dropout import scale_of


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout, **options) -> Tensor:
    return attention_of_merged(torch.stack((q, k, v), dim=1), layout, **options)


def layout_of(lengths: list[int], group_cost: int = 6000):
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    return plan_layout(lengths, cu, group_cost)


LENGTHS = [[1], [5, 5, 5], [97, 1, 13, 13, 40], [3, 1025, 2]]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("group_cost", [0, 6000, 10**9])
@pytest.mark.parametrize("window", [None, 4])
def test_every_token_attends_to_its_own_sequence_alone(lengths, group_cost, window):
    hold_to_plain(lengths, (3, 8), torch.float32, layout_of(lengths, group_cost), 0.4, window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["auto", "reference"])
def test_error_is_at_most_twice_that_of_plain_torch_in_the_same_dtype(form, dtype):
    lengths = [7, 30, 30, 2]
    with forced(form):
        hold_to_plain(lengths, (4, 32), dtype, layout_of(lengths), 32**-0.5)


def hold_to_plain(lengths, heads, dtype, layout, scale, window=None):
    def measure():
        exactly = [torch.randn(sum(lengths), *heads, dtype=torch.float64) for _ in range(3)]
        rounded = [x.to(dtype) for x in exactly]
        expected = attention_by_sequence(*exactly, lengths, scale, window)
        plain = attention_by_sequence(*rounded, lengths, scale, window)
        return [Measured.of("out", expected, plain, packed_attention(*rounded, layout, scale=scale, window=window))]

    hold_over_draws(measure)


@pytest.mark.parametrize("group_cost", [0, 10**9])
def test_gradients_are_those_of_finite_differences(group_cost):
    lengths = [3, 1, 4]
    layout = layout_of(lengths, group_cost)
    q, k, v = (torch.randn(8, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda *x: packed_attention(*x, layout, scale=0.7), (q, k, v))
    first = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: first_row_attention(*x, layout, scale=0.7), (first, k, v))


def test_the_first_rows_query_gives_the_first_rows_of_full_attention():
    lengths = [9, 2, 17]
    layout = layout_of(lengths)
    q, k, v = (torch.randn(28, 4, 8, dtype=torch.float64) for _ in range(3))
    whole = packed_attention(q, k, v, layout, scale=0.5)
    found = first_row_attention(q[layout.starts], k, v, layout, scale=0.5)
    assert torch.allclose(found, whole[layout.starts], atol=1e-12)


def test_dropout_draws_the_same_mask_in_forward_and_backward():
    # With v = identity-like rows the output is the dropped probability itself: its gradient must vanish where it is 0.
    length = 40
    layout = layout_of([length])
    q, k = (torch.randn(length, 1, length) for _ in range(2))
    v = torch.eye(length)[:, None, :].clone().requires_grad_(True)
    torch.manual_seed(5)
    out = packed_attention(q, k, v, layout, scale=0.1, dropout_p=0.3)
    dropped = out.detach()[:, 0] == 0
    assert 0.2 < dropped.float().mean() < 0.4
    out.sum().backward()
    # d out.sum() / d v[j] = sum over queries of the probabilities that were kept
    assert torch.allclose(v.grad[:, 0, 0], out.detach()[:, 0].sum(0), atol=1e-5)
    torch.manual_seed(5)
    again = packed_attention(q, k, v, layout, scale=0.1, dropout_p=0.3)
    assert torch.equal(out, again)


def test_dropout_keeps_the_mean():
    length = 200
    layout = layout_of([length])
    q = k = torch.zeros(length, 1, 4)
    v = torch.ones(length, 1, 4)
    torch.manual_seed(0)
    out = packed_attention(q, k, v, layout, scale=1.0, dropout_p=0.25)
    assert abs(float(out.mean()) - 1.0) < 0.01
    assert scale_of(0.25) == pytest.approx(1 / 0.75)


def test_groups_are_the_cheapest_partition():
    from itertools import combinations

    lengths = [1, 3, 3, 4, 9, 11, 30]

    def cost(groups: list[list[int]]) -> float:
        return sum(len(g) * max(lengths[i] for i in g) ** 2 + 50 for g in groups)

    cuts = range(1, len(lengths))
    every = [c for n in range(len(lengths)) for c in combinations(cuts, n)]
    best = min(cost([list(range(a, b)) for a, b in zip((0, *c), (*c, len(lengths)), strict=True)]) for c in every)
    assert cost(plan_groups(lengths, 50)) == best
