"""Rotary positions put into a merged projection: the plain form's numbers, and a gradient that turns back."""

from __future__ import annotations

import pytest
import torch

from checking import DEVICE, fresh
from regraft.kernels.rotary import rotate, rotate_merged


def turns(tokens: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(tokens, dtype=torch.float64, device=DEVICE)[:, None]
    angle = angle * 0.3 ** torch.arange(size // 2, device=DEVICE)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_queries_and_keys_are_turned_and_values_are_not(dtype):
    qkv = fresh(7, 3, 2, 8).to(dtype)
    cos, sin = turns(7, 8)
    found = rotate_merged(qkv, cos, sin)
    assert found.dtype == dtype and torch.equal(found[:, 2], qkv[:, 2])
    for part in (0, 1):
        wanted = rotate(qkv[:, part], cos, sin)
        torch.testing.assert_close(found[:, part], wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(found.double().norm(), qkv.double().norm(), rtol=1e-2, atol=0)


def test_its_gradient_is_that_of_finite_differences():
    qkv = fresh(5, 3, 1, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotate_merged(x, *turns(5, 4)), [qkv])


def test_a_turn_and_the_opposite_one_cancel():
    qkv = fresh(6, 3, 2, 8)
    cos, sin = turns(6, 8)
    torch.testing.assert_close(rotate_merged(rotate_merged(qkv, cos, sin), cos, -sin), qkv)
