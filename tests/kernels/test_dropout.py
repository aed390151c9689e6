"""Dropout from bulk bits: the right share, the right mean, the same mask backwards."""

from __future__ import annotations

import pytest
import torch

from regraft.kernels.dropout import dropout, keep_mask


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_share_of_kept_values_is_one_minus_p(p):
    n = 400_000
    torch.manual_seed(torch.seed() % 2**31)
    share = float(keep_mask((n,), p).float().mean())
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5 + 1 / 65536


@pytest.mark.parametrize("shape", [(1,), (3,), (7, 5), (2, 3, 11)])
def test_any_shape_and_gradient_equal_to_the_mask(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    y = dropout(x, 0.4)
    y.backward(torch.ones_like(y))
    kept = y != 0
    assert torch.allclose(y[kept], (x * x.grad)[kept])
    assert torch.equal(x.grad != 0, kept)


def test_neighbouring_decisions_are_independent():
    keep = keep_mask((200_000,), 0.5).float() - 0.5
    for lag in (1, 2, 3, 4):
        assert abs(float((keep[lag:] * keep[:-lag]).mean())) < 0.005


def test_the_same_seed_gives_the_same_mask_and_another_seed_another():
    masks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        masks.append(keep_mask((1000,), 0.5))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_it_does_nothing_outside_training_and_refuses_a_p_of_one():
    x = torch.randn(5)
    assert dropout(x, 0.5, training=False) is x
    with pytest.raises(ValueError, match=r"is 1.0, expected in \[0, 0.999992\)"):
        dropout(x, 1.0)
