"""Linear layer with low-rank updates of some of its output columns: LoRA, also of a merged query-key-value layer.

    u = d(x) A^T,   y = x W^T + bias,   y[:, columns_k] += scale_k u_k B_k^T                        (Hu et al. 2022)
    du_k = scale_k dy_k B_k,   dA = du^T d(x),   dB_k = scale_k dy_k^T u_k,   dx = dy W + d'(du A)       d: dropout

Shape: x [.., I], W [O, I], A = stacked A_k [R, I], B_k [O_k, r_k] -> [.., O]. All A_k are one product, and each B_k adds
into its columns of y in place, so three adapted projections cost one read of x and no sum of their own. FLOPs a row:
2 O I + 2 R I + 2 sum O_k r_k; backward the same again for x, and once more for A and B; none for the frozen W. The parts
share one dropout mask on x. There is no Triton here: every product is the BLAS's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regraft.kernels.checks import expect, expect_range
from regraft.kernels.dropout import BELOW, LEVELS, keep_mask, scale_of


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float | Sequence[float],
    *,
    columns: Sequence[int] | None = None,
    out_features: int | None = None,
    p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """x W^T + bias with the updates scale_k B_k A_k; differentiable in x, a, b, and weight and bias where they train.

    Shape: x [.., I]; weight [O, I], or None for the updates alone, [.., out_features]; bias [O]; a[k] [r_k, I]; b[k] [O_k, r_k];
    columns[k]: first output column of part k (default: one after the other). The result has x's dtype (autocast's,
    where it is on); parameters may be of another. Raises ValueError or TypeError, naming the argument.
    """
    parts = len(a)
    scales = [float(scale)] * parts if isinstance(scale, int | float) else [float(s) for s in scale]
    starts = _starts(b) if columns is None else list(columns)
    out = out_features if weight is None else weight.shape[0]
    if out is None:
        out = sum(t.shape[0] for t in b)
    _check(x, weight, bias, a, b, scales, starts, out)
    expect_range("p", p, 0, BELOW)
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    drop = training and round(p * LEVELS) > 0
    # drawn here, not in the operator: what a compiler may run twice or merge must not draw
    keep = _draw(rows, p) if drop else None
    stacked = a[0] if parts == 1 else torch.cat(list(a))
    y = _lora(rows, weight, bias, stacked, list(b), starts, scales, keep, scale_of(p) if drop else 1.0, out)[0]
    return y.view(*x.shape[:-1], out)


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    *,
    columns: Sequence[int] | None = None,
    out_features: int | None = None,
) -> Tensor:
    """The same in plain torch without dropout, by the product B A."""
    out = weight.shape[0] if weight is not None else out_features or sum(t.shape[0] for t in b)
    y = x.new_zeros(*x.shape[:-1], out) if weight is None else torch.nn.functional.linear(x, weight, bias)
    for low, one, other in zip(columns or _starts(b), a, b, strict=True):
        update = scale * torch.nn.functional.linear(torch.nn.functional.linear(x, one), other)
        y = y + torch.nn.functional.pad(update, (low, out - low - other.shape[0]))
    return y


def _draw(rows: Tensor, p: float) -> Tensor:
    if torch.compiler.is_compiling():  # torch's tracer knows no random_ in place
        return torch.rand(rows.shape, device=rows.device) >= round(p * LEVELS) / LEVELS
    return keep_mask(rows.shape, p, rows.device)


def _starts(b: Sequence[Tensor]) -> list[int]:
    starts, low = [], 0
    for part in b:
        starts.append(low)
        low += part.shape[0]
    return starts


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: list[float],
    starts: list[int],
    out: int,
) -> None:
    expect("x", x, shape=(None,) * max(1, x.dim()), contiguous=False)
    width = x.shape[-1]
    if weight is not None:
        expect("weight", weight, shape=(None, width), like=x, contiguous=False)
    if bias is not None:
        if weight is None:
            raise ValueError("bias: is given without weight, expected both or neither")
        expect("bias", bias, shape=(out,), like=x)
    if not a:
        raise ValueError("a: is empty, expected at least one part")
    for name, found in (("b", b), ("scale", scales), ("columns", starts)):
        if len(found) != len(a):
            raise ValueError(f"{name}: has {len(found)} parts, expected {len(a)}, as many as a")
    for k, (one, other, low) in enumerate(zip(a, b, starts, strict=True)):
        expect(f"a[{k}]", one, shape=(None, width), like=x)
        expect(f"b[{k}]", other, shape=(None, one.shape[0]), like=x)
        if low < 0 or low + other.shape[0] > out:
            raise ValueError(f"columns[{k}]: {low} to {low + other.shape[0]}, expected within 0 to {out}")


def _ranks(b: Sequence[Tensor]) -> list[slice]:
    found, low = [], 0
    for part in b:
        found.append(slice(low, low + part.shape[1]))
        low += part.shape[1]
    return found


@torch.library.custom_op("regraft::lora_linear", mutates_args=())
def _lora(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Sequence[Tensor],
    starts: Sequence[int],
    scales: Sequence[float],
    keep: Tensor | None,
    drop_scale: float,
    out: int,
) -> tuple[Tensor, Tensor]:
    """y [T, O], u [T, R]."""
    dtype = x.dtype
    if weight is None:
        y = x.new_zeros(x.shape[0], out)
    elif bias is None:
        y = torch.mm(x, weight.to(dtype).t())
    else:
        y = torch.addmm(bias.to(dtype), x, weight.to(dtype).t())
    u = torch.mm(x if keep is None else x * keep, a.to(dtype).t())
    if keep is not None:
        u.mul_(drop_scale)
    for low, scale, part, ranks in zip(starts, scales, b, _ranks(b), strict=True):
        y[:, low : low + part.shape[0]].addmm_(u[:, ranks], part.to(dtype).t(), alpha=scale)
    return y, u


@_lora.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Sequence[Tensor],
    starts: Sequence[int],
    scales: Sequence[float],
    keep: Tensor | None,
    drop_scale: float,
    out: int,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], out), x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("regraft::lora_linear_backward", mutates_args=())
def _backward(
    dy: Tensor,
    u: Tensor,
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Sequence[Tensor],
    starts: Sequence[int],
    scales: Sequence[float],
    keep: Tensor | None,
    drop_scale: float,
    into_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [T, I] (empty unless `into_x`), dA [R, I], and all dB_k one after the other, flat."""
    dtype = x.dtype
    du = torch.empty_like(u)
    d_b = u.new_empty(sum(t.numel() for t in b))
    at = 0
    for low, scale, part, ranks in zip(starts, scales, b, _ranks(b), strict=True):
        slope = dy[:, low : low + part.shape[0]]
        du[:, ranks] = torch.mm(slope, part.to(dtype)).mul_(scale)
        piece = d_b[at : at + part.numel()].view(part.shape)
        torch.mm(slope.t(), u[:, ranks], out=piece)
        piece.mul_(scale)
        at += part.numel()
    d_a = torch.mm(du.t(), x if keep is None else x * keep)
    if keep is not None:
        d_a.mul_(drop_scale)
    if not into_x:
        return x.new_empty(0), d_a, d_b
    dx = torch.zeros_like(x) if weight is None else torch.mm(dy, weight.to(dtype))
    if keep is None:
        dx.addmm_(du, a.to(dtype))
    else:
        dx.add_(torch.mm(du, a.to(dtype)).mul_(keep), alpha=drop_scale)
    return dx, d_a, d_b


@_backward.register_fake
def _(
    dy: Tensor,
    u: Tensor,
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Sequence[Tensor],
    starts: Sequence[int],
    scales: Sequence[float],
    keep: Tensor | None,
    drop_scale: float,
    into_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x) if into_x else x.new_empty(0)
    return dx, x.new_empty(a.shape), u.new_empty(sum(t.numel() for t in b))


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, a, b, starts, scales, keep, drop_scale, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], x, weight, bias, a, keep, *b)
    ctx.starts, ctx.scales, ctx.drop_scale = list(starts), list(scales), drop_scale
    ctx.trains = [t is not None and t.requires_grad for t in (x, weight, bias)]


def _gradients(ctx: Any, dy: Tensor | None, _: Any) -> tuple:
    u, x, weight, bias, a, keep, *b = ctx.saved_tensors
    if dy is None:
        return None, None, None, None, [None] * len(b), *(None,) * 5
    into_x, into_weight, into_bias = ctx.trains
    dy = dy.contiguous()
    dx, d_a, d_b = _backward(dy, u, x, weight, a, b, ctx.starts, ctx.scales, keep, ctx.drop_scale, into_x)
    pieces = d_b.split([t.numel() for t in b])
    return (
        dx if into_x else None,
        torch.mm(dy.t(), x).to(weight.dtype) if into_weight else None,
        dy.sum(0).to(bias.dtype) if into_bias else None,
        d_a.to(a.dtype),
        [piece.view(t.shape).to(t.dtype) for piece, t in zip(pieces, b, strict=True)],
        *(None,) * 5,
    )


_lora.register_autograd(_gradients, setup_context=_setup)
