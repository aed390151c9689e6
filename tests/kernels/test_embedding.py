"""The row gradient is torch's own embedding gradient."""

from __future__ import annotations

import pytest
import torch

from regraft.kernels.embedding import RowGradient, row_embedding


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_it_gives_the_gradient_of_torch_and_clears_to_zero(kind):
    weight = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    twin = weight.detach().clone().requires_grad_(True)
    gradient = RowGradient(weight, padding_idx=3)
    for _ in range(2):  # the second time starts from what clear() left
        ids = torch.randint(0, 50, (2, 40), dtype=kind)
        ids[0, :4] = 3
        upstream = torch.randn(2, 40, 6, dtype=torch.float64)
        for part in (0, 1):  # two micro-batches add up
            row_embedding(ids[part][None], gradient).backward(upstream[part][None])
        torch.nn.functional.embedding(ids, twin, padding_idx=3).backward(upstream)
        assert torch.allclose(weight.grad, twin.grad, atol=1e-12)
        assert torch.allclose(gradient.rows().norm(), twin.grad.norm())
        gradient.clear()
        assert weight.grad is None
        assert not gradient.buffer.any()
        twin.grad = None
