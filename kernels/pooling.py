"""One vector a sequence: mean, largest or first of the rows of each segment; and L2 normalisation.

    mean: y_b = 1 / n_b sum_t x_t      max: y_b[h] = max_t x_t[h]      first: y_b = x of the first row      (over segment b)
    normalise: y = x / max(|x|, eps)                                     (Reimers and Gurevych 2019 pool and compare so)

Shape: x [T, H] packed, cu_seqlens [B + 1] covering all T rows -> [B, H]. Sums in fp32 (fp64 for fp64). Moves each row
once (first: one a sequence) and one vector a sequence; backward writes each row once. Bound by memory: one FLOP a value.
An empty segment gives zeros. Of equal largest values the first row gets the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.kernels.checks import INTEGERS, expect, expect_bounds
from regraft.kernels.choice import use_triton
from regraft.kernels.lang import accumulate, cdiv, jit, load_as, next_power_of_2, store, tl
from regraft.kernels.shipped import Shipped

KINDS = ("mean", "max", "first")
COLUMNS, ROWS = 128, 32  # of a program's tile


def segment_pool(x: Tensor, cu_seqlens: Tensor, kind: str = "mean", *, normalise: bool = False) -> Tensor:
    """Pool the rows of each segment, differentiable in x.

    Shape: x [T, H], cu_seqlens [B + 1] int32 or int64 from 0 to T -> [B, H] in x's dtype. Raises ValueError or TypeError,
    naming the argument.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: is {kind!r}, expected one of {', '.join(KINDS)}")
    expect("x", x, shape=(None, None), contiguous=False)
    expect("cu_seqlens", cu_seqlens, shape=(None,), dtype=INTEGERS, like=x)
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens: is empty, expected [sequences + 1]")
    expect_bounds("cu_seqlens", cu_seqlens, x.shape[0])
    pooled = _pool(x.contiguous(), cu_seqlens, KINDS.index(kind))[0]
    return l2_normalise(pooled) if normalise else pooled


def l2_normalise(x: Tensor, eps: float = 1e-12) -> Tensor:
    """x / max(|x|, eps) for each row of x [N, H], differentiable."""
    expect("x", x, shape=(None, None), contiguous=False)
    return _normalise(x.contiguous(), eps)[0]


def reference(x: Tensor, cu_seqlens: Tensor, kind: str = "mean", *, normalise: bool = False) -> Tensor:
    """The same in plain torch, a segment at a time, every step in x's dtype."""
    bounds = cu_seqlens.tolist()
    parts = [x[low:high] for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
    reduce = {"mean": lambda p: p.mean(0), "max": lambda p: p.max(0).values, "first": lambda p: p[0]}[kind]
    rows = [reduce(p) if len(p) else x.new_zeros(x.shape[1]) for p in parts]
    y = torch.stack(rows) if rows else x.new_zeros(0, x.shape[1])
    return torch.nn.functional.normalize(y, dim=-1) if normalise else y


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("regraft::segment_pool", mutates_args=())
def _pool(x: Tensor, cu_seqlens: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """y [B, H]; for max the row each value came from, [B, H] int32 (-1: none), else empty."""
    count, width = cu_seqlens.shape[0] - 1, x.shape[1]
    at = torch.empty((count, width) if kind == 1 else (0,), dtype=torch.int32, device=x.device)
    if use_triton(x):
        y = torch.empty(count, width, dtype=x.dtype, device=x.device)
        if count and width:
            _pool_kernel[(count, cdiv(width, COLUMNS))](
                x, cu_seqlens, y, at, width, KIND=kind, BLOCK=COLUMNS, ROWS=ROWS, ACC=accumulate(x.dtype)
            )
        return y, at
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    filled = lengths > 0
    if kind == 2:
        y = x.new_zeros(count, width)
        y[filled] = x.index_select(0, starts[filled])
        return y, at
    y = torch.zeros(count, width, dtype=_wide(x), device=x.device)
    bounds = cu_seqlens.tolist()
    if kind == 0:
        # A sum over contiguous rows each: on CPU two to five times faster than index_add or segment_reduce.
        for b, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            if high > low:
                torch.sum(x[low:high], 0, dtype=y.dtype, out=y[b])
        return y.div_(lengths.clamp_min(1)[:, None]).to(x.dtype), at
    at.fill_(-1)
    for b, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if high > low:
            largest = x[low:high].max(0)
            y[b], at[b] = largest.values, largest.indices + low
    return y.to(x.dtype), at


@_pool.register_fake
def _(x: Tensor, cu_seqlens: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    shape = (cu_seqlens.shape[0] - 1, x.shape[1])
    return x.new_empty(shape), x.new_empty(shape if kind == 1 else (0,), dtype=torch.int32)


@torch.library.custom_op("regraft::segment_pool_backward", mutates_args=())
def _pool_backward(dy: Tensor, at: Tensor, cu_seqlens: Tensor, kind: int, rows: int) -> Tensor:
    """dx [T, H]."""
    count, width = dy.shape
    if use_triton(dy):
        dx = torch.empty(rows, width, dtype=dy.dtype, device=dy.device)
        if rows and width and count:
            _spread_kernel[(count, cdiv(width, COLUMNS))](
                dy, cu_seqlens, dx, at, width, KIND=kind, BLOCK=COLUMNS, ROWS=ROWS, ACC=accumulate(dy.dtype)
            )
        return dx
    lengths = cu_seqlens.diff()
    if kind == 0:
        return torch.repeat_interleave(dy / lengths.clamp_min(1)[:, None].to(dy.dtype), lengths, 0, output_size=rows)
    dx = dy.new_zeros(rows, width)
    filled = lengths > 0
    if kind == 2:
        dx[cu_seqlens[:-1].long()[filled]] = dy[filled]
        return dx
    return dx.scatter_(0, at[filled].long(), dy[filled])


@_pool_backward.register_fake
def _(dy: Tensor, at: Tensor, cu_seqlens: Tensor, kind: int, rows: int) -> Tensor:
    return dy.new_empty(rows, dy.shape[1])


def _pool_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, cu_seqlens, kind = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], cu_seqlens)
    ctx.kind, ctx.rows = kind, x.shape[0]


def _pool_gradients(ctx: Any, dy: Tensor | None, _: Any) -> tuple:
    if dy is None:
        return None, None, None
    at, cu_seqlens = ctx.saved_tensors
    return _pool_backward(dy.contiguous(), at, cu_seqlens, ctx.kind, ctx.rows), None, None


_pool.register_autograd(_pool_gradients, setup_context=_pool_setup)


@torch.library.custom_op("regraft::l2_normalise", mutates_args=())
def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y [N, H], max(|x|, eps) [N]."""
    rows, width = x.shape
    if not use_triton(x) or not width:
        wide = x.to(_wide(x))
        norm = torch.linalg.vector_norm(wide, dim=1).clamp_min(eps)
        return (wide / norm[:, None]).to(x.dtype), norm
    y, norm = torch.empty_like(x), torch.empty(rows, dtype=_wide(x), device=x.device)
    if rows:
        _normalise_kernel[(rows,)](
            x, y, norm, eps, H=width, BLOCK=next_power_of_2(width), ACC=accumulate(x.dtype), num_warps=_warps(width)
        )
    return y, norm


@_normalise.register_fake
def _(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=_wide(x))


@torch.library.custom_op("regraft::l2_normalise_backward", mutates_args=())
def _normalise_backward(dy: Tensor, x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """dx [N, H] = (dy - y (y . dy)) / norm, without the second term where |x| < eps."""
    rows, width = x.shape
    if not use_triton(x) or not width:
        y = x.to(norm.dtype) / norm[:, None]
        along = (y * dy).sum(1) * (norm > eps)
        return ((dy - y * along[:, None]) / norm[:, None]).to(x.dtype)
    dx = torch.empty_like(x)
    if rows:
        _normalise_backward_kernel[(rows,)](
            dy, x, norm, dx, eps, H=width, BLOCK=next_power_of_2(width), ACC=accumulate(x.dtype),
            num_warps=_warps(width),
        )  # fmt: skip
    return dx


@_normalise_backward.register_fake
def _(dy: Tensor, x: Tensor, norm: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


def _normalise_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[1])
    ctx.eps = inputs[1]


def _normalise_gradients(ctx: Any, dy: Tensor | None, _: Any) -> tuple:
    if dy is None:
        return None, None
    return _normalise_backward(dy.contiguous(), *ctx.saved_tensors, ctx.eps), None


_normalise.register_autograd(_normalise_gradients, setup_context=_normalise_setup)


def _warps(width: int) -> int:
    return min(16, max(1, next_power_of_2(width) // 256))


@jit
def _pool_kernel(
    x_ptr, cu_ptr, y_ptr, at_ptr, width, KIND: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr
):
    segment = tl.program_id(0).to(tl.int64)
    low = tl.load(cu_ptr + segment).to(tl.int64)
    high = tl.load(cu_ptr + segment + 1).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    out = segment * width + column
    if KIND == 2:
        filled = here & (column.to(tl.int64) * 0 + low < high)
        store(y_ptr + out, load_as(x_ptr + low * width + column, filled, ACC), here)
    elif KIND == 0:
        total = tl.zeros([ROWS, BLOCK], dtype=ACC)
        for first in range(low, high, ROWS):
            row = first + tl.arange(0, ROWS)
            inside = (row < high)[:, None] & here[None, :]
            total += load_as(x_ptr + row[:, None] * width + column[None, :], inside, ACC)
        store(y_ptr + out, tl.sum(total, 0) / tl.maximum(high - low, 1).to(ACC), here)
    else:
        best = tl.full([ROWS, BLOCK], float("-inf"), dtype=ACC)
        where = tl.full([ROWS, BLOCK], 2147483647, dtype=tl.int32)
        for first in range(low, high, ROWS):
            row = first + tl.arange(0, ROWS)
            inside = (row < high)[:, None] & here[None, :]
            x = load_as(x_ptr + row[:, None] * width + column[None, :], inside, ACC)
            # a value of -inf still beats no value, and NaN any: it is not to be lost
            better = inside & ((x > best) | ((x != x) & (best == best)) | (where == 2147483647))
            best = tl.where(better, x, best)
            where = tl.where(better, row[:, None].to(tl.int32), where)
        lost = tl.max((best != best).to(tl.int32), 0) > 0
        top = tl.where(lost, float("nan"), tl.max(best, 0))
        found = tl.where(lost[None, :], best != best, best == top[None, :])
        chosen = tl.min(tl.where(found, where, 2147483647), 0)
        store(y_ptr + out, tl.where(low < high, top, 0.0), here)
        tl.store(at_ptr + out, tl.where(low < high, chosen, -1), mask=here)


@jit
def _spread_kernel(
    dy_ptr, cu_ptr, dx_ptr, at_ptr, width, KIND: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    low = tl.load(cu_ptr + segment).to(tl.int64)
    high = tl.load(cu_ptr + segment + 1).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    dy = load_as(dy_ptr + segment * width + column, here, ACC)
    chosen = tl.zeros([BLOCK], dtype=tl.int32) + low.to(tl.int32)
    if KIND == 0:
        dy = dy / tl.maximum(high - low, 1).to(ACC)
    elif KIND == 1:
        chosen = tl.load(at_ptr + segment * width + column, mask=here, other=-1)
    for first in range(low, high, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < high)[:, None] & here[None, :]
        value = tl.zeros([ROWS, BLOCK], dtype=ACC) + dy[None, :]
        if KIND != 0:
            value = tl.where(row[:, None].to(tl.int32) == chosen[None, :], value, 0.0)
        store(dx_ptr + row[:, None] * width + column[None, :], value, inside)


@jit
def _normalise_kernel(x_ptr, y_ptr, norm_ptr, eps, H: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < H
    x = load_as(x_ptr + row * H + column, here, ACC)
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, 0)), eps)
    store(y_ptr + row * H + column, x / norm, here)
    tl.store(norm_ptr + row, norm)


@jit
def _normalise_backward_kernel(
    dy_ptr, x_ptr, norm_ptr, dx_ptr, eps, H: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < H
    norm = tl.load(norm_ptr + row)
    y = load_as(x_ptr + row * H + column, here, ACC) / norm
    dy = load_as(dy_ptr + row * H + column, here, ACC)
    along = tl.where(norm > eps, tl.sum(y * dy, 0), 0.0)
    store(dx_ptr + row * H + column, (dy - y * along) / norm, here)


def shipped() -> list[Shipped]:
    """Each kind forward and backward, and normalisation at 768, in bf16."""
    found = []
    tile = {"BLOCK": COLUMNS, "ROWS": ROWS, "ACC": tl.float32}
    for number, kind in enumerate(KINDS):
        for name, kernel, pair in (("", _pool_kernel, "x y"), (" backward", _spread_kernel, "dy dx")):
            read, written = pair.split()
            types = {
                f"{read}_ptr": "*bf16",
                "cu_ptr": "*i32",
                f"{written}_ptr": "*bf16",
                "at_ptr": "*i32",
                "width": "i32",
            }
            wide = name == "" and kind != "first"  # the others read one vector a segment
            found.append(
                Shipped.of(f"pool {kind}{name}", kernel, types, {**tile, "KIND": number}, aligned=("width",), wide_loads=wide)
            )  # fmt: skip
    pointers = {
        "x_ptr": "*bf16",
        "y_ptr": "*bf16",
        "dy_ptr": "*bf16",
        "dx_ptr": "*bf16",
        "norm_ptr": "*fp32",
        "eps": "fp32",
    }
    constants = {"H": 768, "BLOCK": 1024, "ACC": tl.float32}
    for name, kernel in (("", _normalise_kernel), (" backward", _normalise_backward_kernel)):
        found.append(
            Shipped.of(f"l2 normalise{name}", kernel, pointers, constants, num_warps=_warps(768), wide_loads=False)
        )
    return found
