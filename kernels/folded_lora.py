"""Frozen linear layers with LoRA, as one matrix product: the low-rank update is added to the weight, not to the output.

    W_i' = W_i + s_i B_i A_i,   y_i = x W_i'^T + b_i                       for n layers i that share their input
    dx = sum_i dy_i W_i',   dA_i = s_i (dy_i B_i)^T x,   dB_i = s_i dy_i^T (x A_i^T)

Shape: x [T, K]; base [n, M, K], bias [n, M] or None; A_i [r, K], B_i [M, r] -> y [T, n, M].
Cost: folding takes 2 r M K operations a layer, whatever T; added to the output, the update takes 2 T r (M + K) and one
pass over y and dx each. No product of T x M with T x K is made: frozen weights have no gradient. The folded weight is
made again in the backward pass instead of kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regraft.kernels import linear_native, linear_torch
from regraft.kernels.checks import expect


def _folded(base: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(base, up, down, alpha=scale)


class _FoldedLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Tensor, bias: Tensor | None, scale: float, *pairs: Tensor) -> Tensor:
        n, outputs, inputs = base.shape
        down, up = torch.stack(pairs[:n]), torch.stack(pairs[n:])
        weight = _folded(base, down, up, scale).view(n * outputs, inputs)
        ctx.save_for_backward(x, base, down, up)
        ctx.scale = scale
        ctx.by = linear_native if linear_native.pays(x, weight) else linear_torch
        out = ctx.by.linear(x, weight, None if bias is None else bias.view(-1))
        return out.view(-1, n, outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, base, down, up = ctx.saved_tensors
        n, outputs, inputs = base.shape
        rank = down.shape[1]
        flat = grad.reshape(-1, n * outputs)
        each = flat.view(-1, n, outputs).transpose(0, 1)  # [n, T, M]
        inner = torch.bmm(each, up)  # [n, T, r]
        low = torch.mm(x, down.view(n * rank, inputs).t()).view(-1, n, rank).transpose(0, 1)
        d_up = torch.bmm(each.transpose(1, 2), low).mul_(ctx.scale)
        d_down = torch.mm(inner.permute(0, 2, 1).reshape(n * rank, -1), x).mul_(ctx.scale).view(n, rank, inputs)
        dx = None
        if ctx.needs_input_grad[0]:
            weight = _folded(base, down, up, ctx.scale).view(n * outputs, inputs)
            dx = ctx.by.input_gradient(flat, weight)
        return dx, None, None, None, *d_down.unbind(), *d_up.unbind()


def folded_lora(
    x: Tensor, base: Tensor, bias: Tensor | None, down: Sequence[Tensor], up: Sequence[Tensor], scale: float
) -> Tensor:
    """n frozen layers with LoRA over the same input: x [T, K] -> [T, n, M]. `down`: the A_i, `up`: the B_i.

    Raises ValueError or TypeError, naming the argument.
    """
    expect("base", base, shape=(None, None, None), contiguous=False)
    n, outputs, inputs = base.shape
    expect("x", x, shape=(None, inputs), dtype=base.dtype, like=base, contiguous=False)
    if bias is not None:
        expect("bias", bias, shape=(n, outputs), dtype=base.dtype, like=base, contiguous=False)
    for name, parts in (("down", down), ("up", up)):
        if len(parts) != n:
            raise ValueError(f"{name}: has {len(parts)} parts, expected {n}, one a layer")
    rank = down[0].shape[0] if n and down[0].dim() else None
    for i, (one, other) in enumerate(zip(down, up, strict=True)):
        expect(f"down[{i}]", one, shape=(rank, inputs), dtype=base.dtype, like=base, contiguous=False)
        expect(f"up[{i}]", other, shape=(outputs, rank), dtype=base.dtype, like=base, contiguous=False)
    return _FoldedLora.apply(x, base, bias, scale, *down, *up)
