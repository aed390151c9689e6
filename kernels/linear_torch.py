"""The functions of linear_native.py by torch's own products (oneDNN), where those do not run.

    y = x W^T + b,   h = gelu(y)                       dx = dy W,   dW = dy^T x,   db = sum dy

Products with W may have a low-rank term added: y + u B^T, dx + v A. Shapes and types are those of linear_native.py, for any I and O;
what a product leaves is rounded to bf16 before a low-rank term is added, as under autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.kernels.linear_native import HALF, LowRank


def step(weight: Tensor) -> int:
    """What ranks of low-rank terms with this weight are best multiples of."""
    return 8


def filled(rows: int) -> int:
    """`rows` rounded up to one of eight numbers between powers of two, and to a multiple of sixteen."""
    step = max(16, (1 << rows.bit_length()) // 16)
    return -(-rows // step) * step


def as_rows(x: Tensor, dtype: torch.dtype = HALF) -> Tensor:
    """[.., I] -> [rows, I] in `dtype`; in bf16 filled up with zeros to a number of rows that products are likely to have seen."""
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if dtype != HALF or filled(count) == count:
        return rows.to(dtype)
    whole = rows.new_empty(filled(count), rows.shape[1], dtype=dtype)
    whole[:count].copy_(rows)
    whole[count:].zero_()
    return whole


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, low: LowRank = None) -> Tensor:
    """x W^T + b, and + u B^T of `low`, which is (u, B). Shape: x [T, I], weight [O, I], bias [O], u [T, R], B [O, R] -> [T, O]."""
    out = torch.nn.functional.linear(x, weight, bias)
    return out if low is None else out.addmm_(low[0], low[1].t())


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: LowRank = None, *, keep: bool = True
) -> tuple[Tensor | None, Tensor]:
    """y = x W^T + b, with `low` as `linear`, and gelu(y), by erf. Shape: as `linear`, twice; y is None unless `keep`."""
    out = linear(x, weight, bias, low)
    return out if keep else None, torch.nn.functional.gelu(out)


def input_gradient(dy: Tensor, weight: Tensor, low: LowRank = None) -> Tensor:
    """dy W, and + v A of `low`, which is (v, A). Shape: dy [T, O], weight [O, I], v [T, R], A [R, I] -> [T, I]."""
    out = dy @ weight
    return out if low is None else out.addmm_(*low)


def weight_gradients(dy: Tensor, x: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """dy^T x and, where `bias`, the sum of dy's rows. Shape: dy [T, O], x [T, I] -> [O, I], [O] in fp32, or as x."""
    kind = torch.float32 if dy.dtype == HALF else dy.dtype
    return (dy.t() @ x).to(kind), dy.sum(0, dtype=kind) if bias else None


def gelu_gradient(dh: Tensor, y: Tensor) -> Tensor:
    """dh times gelu's slope at y. Shape: dh, y [T, O] -> [T, O]."""
    return torch.ops.aten.gelu_backward(dh, y)
