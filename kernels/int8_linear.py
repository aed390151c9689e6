"""A frozen linear layer whose weight is held as rows of int8 with one scale each; products run in the input's type.

    y = x (s * W8)^T + b,   dx = dy (s * W8),   s_o = max_i |W_oi| / 127

Shape: x [.., K], W8 [M, K] int8, s [M] -> [.., M]. The weight is made whole for a product and forgotten after it, in the
forward and again in the backward pass: a quarter of the memory of fp32 stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows [M, K] and their scales [M] of a weight."""
    scale = (weight.abs().amax(dim=1) / 127.0).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.round(weight / scale[:, None]).to(torch.int8), scale


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return torch.matmul(x, weight.to(x.dtype).t()) * scale.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return torch.matmul(grad * scale.to(grad.dtype), weight.to(grad.dtype)), None, None


class Int8Linear(nn.Linear):
    """nn.Linear with an int8 weight and `scale` [M]; it cannot be trained, what is added to it can."""

    scale: Tensor

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        rows, scale = quantise_rows(plain.weight.data)
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.register_buffer("scale", scale)
        if plain.bias is not None:
            self.bias = nn.Parameter(plain.bias.data, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out = _Int8Product.apply(x, self.weight, self.scale)
        return out if self.bias is None else out + self.bias

    def whole_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[M, K], rounded once."""
        whole = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        return torch.mul(self.weight, self.scale[:, None], out=whole)
