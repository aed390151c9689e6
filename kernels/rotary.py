"""Rotary positions: pairs of values of queries and keys turned by an angle that grows with the position.

    [a b] -> [a cos - b sin, b cos + a sin],   a, b: the halves of a head       (Su et al. 2021; halves as in GPT-NeoX)

The Triton attention turns queries and keys as it loads them. Here is the plain form, and for a CPU the one that turns both
inside the projection's own output [T, 3, H, D]: two passes over queries and keys, where separate ones are copied, negated,
joined and stacked. The gradient is turned back by the opposite angle.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.kernels.checks import expect


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [T, H, D] in fp32 or better, by halves; cos, sin [T, D // 2]."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    a, b = wide.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(wide.dtype), sin[:, None].to(wide.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class _RotateMerged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(qkv, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    cos, sin = cos[:, None, None].to(wide), sin[:, None, None].to(wide)
    a, b = qkv[:, :2].to(wide).chunk(2, dim=-1)
    out = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    low, high = out[:, :2].chunk(2, dim=-1)
    low.copy_((a * cos).addcmul_(b, sin, value=-1.0))
    high.copy_((b * cos).addcmul_(a, sin))
    out[:, 2] = qkv[:, 2]
    return out


def rotate_merged(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries and keys of qkv [T, 3, H, D] turned, values as they are; in fp32 or better, differentiable in qkv.

    Shape: cos, sin [T, D // 2]. Raises ValueError or TypeError, naming the argument.
    """
    expect("qkv", qkv, shape=(None, 3, None, None), contiguous=False)
    if qkv.shape[-1] % 2:
        raise ValueError(f"qkv: head size is {qkv.shape[-1]}, expected an even number where positions are rotary")
    for name, angle in (("cos", cos), ("sin", sin)):
        expect(name, angle, shape=(qkv.shape[0], qkv.shape[-1] // 2), like=qkv, contiguous=False)
    return _RotateMerged.apply(qkv, cos, sin)
