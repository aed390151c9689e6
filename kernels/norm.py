"""Dropout, residual sum and LayerNorm in one pass.

    z = dropout(x) + residual,   y = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias         (Ba et al. 2016)

Shape: x, residual [.., H] -> y [.., H]. Statistics in fp32 (fp64 for fp64). Forward moves 3 values an element (x and
residual read, y written), backward 5 (x, residual, dy read; dx, dresidual written, one of them only without dropout):
bound by memory. Nothing is kept for the backward but the inputs, two numbers a row and the seed. About 20 FLOPs and
9 integer operations an element. The gradients of weight and bias are summed by each program over its own rows, then
over programs: no atomics, the same bits in every run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.kernels.checks import expect, expect_range
from regraft.kernels.choice import use_triton
from regraft.kernels.dropout import scale_of
from regraft.kernels.lang import MORE_ROWS, accumulate, block_of, cdiv, jit, load_as, processors, store, tl
from regraft.kernels.philox import keep_mask, keep_tile, resolve_seed, threshold_of
from regraft.kernels.shipped import Shipped

LARGEST = 16384
TILE = 4096  # values a program holds of each operand


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-12,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """LayerNorm(dropout(x) + residual), differentiable in the four tensors.

    Shape: x, residual [.., H] of one dtype, weight, bias [H] of any -> [.., H] in x's dtype. `seed` [1] int64 on x's
    device (drawn from torch's generator where it is None), `site` tells this place apart from others. Raises ValueError
    or TypeError for what a kernel does not take.
    """
    width = x.shape[-1] if x.dim() else 0
    expect("x", x, shape=(None,) * max(1, x.dim()), contiguous=False)
    expect_range("x.shape[-1]", width, 1, LARGEST + 1)
    if residual is not None:
        expect("residual", residual, shape=x.shape, dtype=x.dtype, like=x, contiguous=False)
        residual = residual.reshape(-1, width).contiguous()
    expect("weight", weight, shape=(width,), like=x)
    if bias is not None:
        expect("bias", bias, shape=(width,), like=x)
    seed = resolve_seed(seed, p, x.device)
    rows = x.reshape(-1, width).contiguous()
    return _forward(rows, residual, weight, bias, seed, p, site, eps)[0].view(x.shape)


def reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-12,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """The same in plain torch, x [T, H], every step in x's dtype."""
    z = x
    if seed is not None and threshold_of(p):
        z = x * _keep(x, seed, p, site) * scale_of(p)
    z = z if residual is None else z + residual
    return torch.nn.functional.layer_norm(z, x.shape[-1:], weight, bias, eps)


def _keep(x: Tensor, seed: Tensor, p: float, site: int) -> Tensor:
    return keep_mask(seed, torch.arange(x.shape[0], device=x.device), x.shape[1], p, site=site)


def _summed(x: Tensor, residual: Tensor | None, seed: Tensor | None, p: float, site: int) -> Tensor:
    # z in the dtype that statistics are taken in
    z = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if seed is not None:
        z = z * _keep(x, seed, p, site) * scale_of(p)
    return z if residual is None else z + residual


@torch.library.custom_op("regraft::norm_forward", mutates_args=())
def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    site: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, H], mean [T], 1 / deviation [T]. A seed of None means no dropout."""
    if not use_triton(x):
        z = _summed(x, residual, seed, p, site)
        mean = z.mean(-1)
        rstd = ((z - mean[:, None]).square().mean(-1) + eps).rsqrt()
        y = (z - mean[:, None]) * rstd[:, None] * weight
        return (y if bias is None else y + bias).to(x.dtype), mean, rstd
    rows, width = x.shape
    y = torch.empty_like(x)
    mean = torch.empty(rows, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if rows:
        block = block_of(width)
        tile = max(1, min(4, TILE // block)) if rows >= 1024 else 1
        tile *= MORE_ROWS
        _forward_kernel[(cdiv(rows, tile),)](
            x, residual, weight, bias, seed, y, mean, rstd, rows, eps, scale_of(p), threshold_of(p), site,
            H=width, BLOCK=block, ROWS=tile, HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None,
            DROP=seed is not None, ACC=accumulate(x.dtype), num_warps=_warps(tile * block),
        )  # fmt: skip
    return y, mean, rstd


@_forward.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    site: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return torch.empty_like(x), mean, torch.empty_like(mean)


@torch.library.custom_op("regraft::norm_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    p: float,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dz [T, H]; dx [T, H] where there is dropout, else empty (it is dz); dweight, dbias [H] in fp32."""
    rows, width = x.shape
    dz = torch.empty_like(x)
    dx = torch.empty_like(x) if seed is not None else x.new_empty(0)
    if not use_triton(x):
        xhat = (_summed(x, residual, seed, p, site) - mean[:, None]) * rstd[:, None]
        g = dy.to(xhat.dtype)
        wg = g * weight
        slope = wg - xhat * (xhat * wg).mean(-1, keepdim=True) - wg.mean(-1, keepdim=True)
        slope = slope * rstd[:, None]
        dz.copy_(slope)
        if seed is not None:
            dx.copy_(slope * _keep(x, seed, p, site) * scale_of(p))
        return dz, dx, (g * xhat).sum(0), g.sum(0)
    block = block_of(width)
    tile = max(1, TILE // block) * MORE_ROWS
    programs = min(max(1, cdiv(rows, tile)), 2 * processors(x.device))
    partial = torch.empty(2, programs, width, dtype=mean.dtype, device=x.device)
    _backward_kernel[(programs,)](
        dy, x, residual, weight, mean, rstd, seed, dz, dx, partial, rows, scale_of(p), threshold_of(p), site,
        H=width, BLOCK=block, ROWS=tile, HAS_RESIDUAL=residual is not None, DROP=seed is not None,
        ACC=accumulate(x.dtype), num_warps=_warps(tile * block) * 2,
    )  # fmt: skip
    sums = partial.sum(1)
    return dz, dx, sums[0].clone(), sums[1].clone()


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    p: float,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x) if seed is not None else x.new_empty(0)
    return torch.empty_like(x), dx, mean.new_empty(x.shape[1]), mean.new_empty(x.shape[1])


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, weight, bias, seed, p, site, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, residual, weight, bias, mean, rstd, seed)
    ctx.p, ctx.site = p, site


def _gradients(ctx: Any, dy: Tensor, *_: Any) -> tuple:
    x, residual, weight, bias, mean, rstd, seed = ctx.saved_tensors
    dz, dx, dweight, dbias = _backward(dy.contiguous(), x, residual, weight, mean, rstd, seed, ctx.p, ctx.site)
    return (
        dz if seed is None else dx,
        None if residual is None else dz,
        dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        *(None,) * 4,
    )


_forward.register_autograd(_gradients, setup_context=_setup)


def _warps(values: int) -> int:
    return min(16, max(1, values // 1024))


@jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, mean_ptr, rstd_ptr, rows, eps, scale, threshold, site,
    H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    here = column < H
    inside = (row < rows)[:, None] & here[None, :]
    at = row.to(tl.int64)[:, None] * H + column[None, :]
    z = load_as(x_ptr + at, inside, ACC)
    if DROP:
        group = tl.arange(0, BLOCK // 8)
        keep = keep_tile(tl.load(seed_ptr), group[None, :], row[:, None], 0, site, threshold, ROWS, BLOCK)
        z = tl.where(keep, z * scale, 0.0)
    if HAS_RESIDUAL:
        z += load_as(residual_ptr + at, inside, ACC)
    mean = tl.sum(z, 1) / H
    centred = tl.where(inside, z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / H + eps)
    y = centred * rstd[:, None] * load_as(weight_ptr + column, here, ACC)[None, :]
    if HAS_BIAS:
        y += load_as(bias_ptr + column, here, ACC)[None, :]
    store(y_ptr + at, y, inside)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@jit
def _backward_kernel(
    dy_ptr, x_ptr, residual_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr, dz_ptr, dx_ptr, partial_ptr, rows, scale,
    threshold, site, H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    DROP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    here = column < H
    weight = load_as(weight_ptr + column, here, ACC)[None, :]
    dweight = tl.zeros([ROWS, BLOCK], dtype=ACC)
    dbias = tl.zeros([ROWS, BLOCK], dtype=ACC)
    for first in range(program * ROWS, rows, programs * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & here[None, :]
        at = row.to(tl.int64)[:, None] * H + column[None, :]
        dy = load_as(dy_ptr + at, inside, ACC)
        z = load_as(x_ptr + at, inside, ACC)
        keep = inside
        if DROP:
            group = tl.arange(0, BLOCK // 8)
            keep = keep_tile(tl.load(seed_ptr), group[None, :], row[:, None], 0, site, threshold, ROWS, BLOCK)
            z = tl.where(keep, z * scale, 0.0)
        if HAS_RESIDUAL:
            z += load_as(residual_ptr + at, inside, ACC)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        xhat = tl.where(inside, (z - mean[:, None]) * rstd[:, None], 0.0)
        dweight += dy * xhat
        dbias += dy
        slope = dy * weight
        slope = slope - xhat * (tl.sum(xhat * slope, 1) / H)[:, None] - (tl.sum(slope, 1) / H)[:, None]
        slope = slope * rstd[:, None]
        store(dz_ptr + at, slope, inside)
        if DROP:
            store(dx_ptr + at, tl.where(keep, slope * scale, 0.0), inside)
    at = partial_ptr + program.to(tl.int64) * H + column
    tl.store(at, tl.sum(dweight, 0), mask=here)
    tl.store(at + programs.to(tl.int64) * H, tl.sum(dbias, 0), mask=here)


def shipped() -> list[Shipped]:
    """Forward and backward at the hidden sizes of common encoders, with dropout and residual, in bf16."""
    found = []
    for width in (384, 768, 1024):
        block = block_of(width)
        flags = {"HAS_RESIDUAL": True, "DROP": True, "ACC": tl.float32, "H": width, "BLOCK": block}
        pointers = {"x_ptr": "*bf16", "residual_ptr": "*bf16", "weight_ptr": "*fp32"}
        forward = {
            **pointers, "bias_ptr": "*fp32", "seed_ptr": "*i64", "y_ptr": "*bf16", "mean_ptr": "*fp32",
            "rstd_ptr": "*fp32", "rows": "i32", "eps": "fp32", "scale": "fp32", "threshold": "i32", "site": "i32",
        }  # fmt: skip
        backward = {
            "dy_ptr": "*bf16", **pointers, "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "seed_ptr": "*i64",
            "dz_ptr": "*bf16", "dx_ptr": "*bf16", "partial_ptr": "*fp32", "rows": "i32", "scale": "fp32",
            "threshold": "i32", "site": "i32",
        }  # fmt: skip
        tile = min(4, TILE // block)
        found.append(
            Shipped.of(f"norm forward {width}", _forward_kernel, forward,
                       {**flags, "HAS_BIAS": True, "ROWS": tile}, num_warps=_warps(tile * block))
        )  # fmt: skip
        found.append(
            Shipped.of(f"norm backward {width}", _backward_kernel, backward,
                       {**flags, "ROWS": TILE // block}, num_warps=_warps(TILE) * 2)
        )  # fmt: skip
    return found
