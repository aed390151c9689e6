"""LoRA folded into its frozen weights: as near to fp64 as with the update added to the output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regraft.kernels import linear_native
from regraft.kernels.folded_lora import folded_lora

SCALE = 1.5


def drawn(rows: int, inputs: int, outputs: int, count: int, rank: int) -> dict[str, list[Tensor]]:
    return {
        "x": [torch.randn(rows, inputs)],
        "frozen": [torch.randn(count, outputs, inputs) / inputs**0.5, torch.randn(count, outputs)],
        "down": [torch.randn(rank, inputs) / inputs**0.5 for _ in range(count)],
        "up": [torch.randn(outputs, rank) for _ in range(count)],
    }


def added(x: Tensor, base: Tensor, bias: Tensor, down: list[Tensor], up: list[Tensor], scale: float) -> Tensor:
    layers = zip(base, bias, down, up, strict=True)
    return torch.stack([x @ w.T + b + scale * ((x @ a.T) @ o.T) for w, b, a, o in layers], 1)


def outcome(function, parts: dict[str, list[Tensor]], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output, then the gradients of x, of each A and of each B."""
    own = {name: [t.to(dtype, copy=True) for t in tensors] for name, tensors in parts.items()}
    leaves = [t.requires_grad_() for name in ("x", "down", "up") for t in own[name]]
    y = function(own["x"][0], *own["frozen"], own["down"], own["up"], SCALE)
    y.backward(grad.to(dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("in_c", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "outputs", "count", "rank"), [(97, 384, 384, 3, 8), (24, 96, 64, 1, 4)])
def test_it_is_as_near_to_fp64_as_the_update_added_to_the_output(
    rows, inputs, outputs, count, rank, in_c, any_vendor, monkeypatch
):
    if not in_c:
        monkeypatch.setattr(linear_native, "runs_here", lambda weight: False)
    elif not linear_native.pays(torch.zeros(rows, inputs), torch.zeros(outputs, inputs)):
        pytest.skip("products in fp32 are not computed in C on this processor")
    parts, grad = drawn(rows, inputs, outputs, count, rank), torch.randn(rows, count, outputs)
    found = outcome(folded_lora, parts, grad, torch.float32)
    plain = outcome(added, parts, grad, torch.float32)
    wanted = outcome(added, parts, grad, torch.float64)
    for i, (ours, theirs, exact) in enumerate(zip(found, plain, wanted, strict=True)):
        error, allowed = (float((t.double() - exact).norm() / exact.norm()) for t in (ours, theirs))
        assert error <= 2 * allowed, (i, error, allowed)
