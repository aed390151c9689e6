"""Bias and GELU in one pass, and its gated form.

    y = gelu(x + bias)                              gelu(u) = u Phi(u), Phi by erf      (Hendrycks and Gimpel 2016)
    y = gelu(a + bias_a) * (g + bias_g),  x = [a g]                                     (GeGLU, Shazeer 2020)

Shape: x [.., F] (gated: [.., 2F]) -> y [.., F]. Moves 2 values an element forward (gated 3 an output) and 3 backward
(gated 5): bound by memory. About 25 FLOPs an element, erf included. The bias gradient is summed in the same pass by
each program over its own rows, then over programs: no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.kernels.checks import expect
from regraft.kernels.choice import use_triton
from regraft.kernels.lang import MORE_ROWS, accumulate, cdiv, jit, load_as, processors, store, tl
from regraft.kernels.shipped import Shipped

BLOCK = 512
ROWS = 4


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu(x + bias), differentiable in both. Shape: x [.., F], bias [F] -> [.., F] in x's dtype.

    Raises ValueError or TypeError for what a kernel does not take.
    """
    return _checked(x, bias, gated=False)


def bias_geglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu(first half) * second half of x + bias, differentiable in both. Shape: x [.., 2F], bias [2F] -> [.., F].

    Raises ValueError or TypeError for what a kernel does not take.
    """
    if x.dim() and x.shape[-1] % 2:
        raise ValueError(f"x: last dimension is {x.shape[-1]}, expected an even number (values, then gates)")
    return _checked(x, bias, gated=True)


def _checked(x: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    if x.dim() < 1:
        raise ValueError("x: is a scalar, expected [.., F]")
    expect("x", x, contiguous=False)
    width = x.shape[-1]
    if bias is not None:
        expect("bias", bias, shape=(width,), like=x)
    y = _forward(x.reshape(-1, width).contiguous(), bias, gated)
    return y.view(*x.shape[:-1], y.shape[-1])


def reference(x: Tensor, bias: Tensor | None = None, gated: bool = False) -> Tensor:
    """The same in plain torch, every step in x's dtype."""
    x = x if bias is None else x + bias
    if not gated:
        return torch.nn.functional.gelu(x)
    value, gate = x.chunk(2, dim=-1)
    return torch.nn.functional.gelu(value) * gate


def _wide(x: Tensor, bias: Tensor | None) -> Tensor:
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x if bias is None else x + bias


def _slope(u: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(u * 0.5**0.5)) + u * torch.exp(-0.5 * u * u) * 0.3989422804014327


@torch.library.custom_op("regraft::gelu_forward", mutates_args=())
def _forward(x: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    """x [T, F] (gated: [T, 2F]) -> [T, F]."""
    rows, width = x.shape
    out = width // 2 if gated else width
    if not use_triton(x):
        return reference(_wide(x, bias), None, gated).to(x.dtype)
    y = x.new_empty(rows, out)
    tile = ROWS * MORE_ROWS
    if y.numel():
        _forward_kernel[(cdiv(rows, tile), cdiv(out, BLOCK))](
            x, bias, y, rows, F=out, GATED=gated, HAS_BIAS=bias is not None, ROWS=tile, BLOCK=BLOCK,
            ACC=accumulate(x.dtype), num_warps=4,
        )  # fmt: skip
    return y


@_forward.register_fake
def _(x: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2 if gated else x.shape[1])


@torch.library.custom_op("regraft::gelu_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, bias: Tensor | None, gated: bool) -> tuple[Tensor, Tensor]:
    """dx like x; dbias in fp32 (fp64 for fp64), empty without a bias."""
    rows, width = x.shape
    out = width // 2 if gated else width
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not use_triton(x):
        u, g = _wide(x, bias), dy.to(wide)
        if gated:
            value, gate = u.chunk(2, dim=-1)
            slope = torch.cat([g * gate * _slope(value), g * torch.nn.functional.gelu(value)], dim=-1)
        else:
            slope = g * _slope(u)
        return slope.to(x.dtype), slope.new_empty(0) if bias is None else slope.sum(0)
    dx = torch.empty_like(x)
    blocks = max(1, cdiv(out, BLOCK))
    tile = ROWS * MORE_ROWS
    programs = max(1, min(cdiv(rows, tile), cdiv(8 * processors(x.device), blocks)))
    partial = torch.empty((programs, width) if bias is not None else (0,), dtype=wide, device=x.device)
    if x.numel():
        _backward_kernel[(programs, blocks)](
            dy, x, bias, dx, partial, rows, F=out, GATED=gated, HAS_BIAS=bias is not None, ROWS=tile, BLOCK=BLOCK,
            ACC=accumulate(x.dtype), num_warps=8 if gated else 4,
        )  # fmt: skip
    elif bias is not None:
        partial.zero_()
    return dx, partial.sum(0) if bias is not None else partial


@_backward.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor | None, gated: bool) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty_like(x), x.new_empty(0 if bias is None else x.shape[1], dtype=wide)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, bias, ctx.gated = inputs
    ctx.save_for_backward(x, bias)


def _gradients(ctx: Any, dy: Tensor) -> tuple:
    x, bias = ctx.saved_tensors
    dx, dbias = _backward(dy.contiguous(), x, bias, ctx.gated)
    return dx, None if bias is None else dbias.to(bias.dtype), None


_forward.register_autograd(_gradients, setup_context=_setup)


@jit
def _cdf(u):
    return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))


@jit
def _forward_kernel(
    x_ptr, bias_ptr, y_ptr, rows, F: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < F
    inside = (row < rows)[:, None] & here[None, :]
    WIDTH: tl.constexpr = 2 * F if GATED else F
    at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    u = load_as(x_ptr + at, inside, ACC)
    if HAS_BIAS:
        u += load_as(bias_ptr + column, here, ACC)[None, :]
    y = u * _cdf(u)
    if GATED:
        gate = load_as(x_ptr + at + F, inside, ACC)
        if HAS_BIAS:
            gate += load_as(bias_ptr + F + column, here, ACC)[None, :]
        y = y * gate
    store(y_ptr + row.to(tl.int64)[:, None] * F + column[None, :], y, inside)


@jit
def _backward_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr, partial_ptr, rows, F: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < F
    WIDTH: tl.constexpr = 2 * F if GATED else F
    dbias = tl.zeros([ROWS, BLOCK], dtype=ACC)
    dbias_gate = tl.zeros([ROWS, BLOCK], dtype=ACC)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & here[None, :]
        at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        slope = load_as(dy_ptr + row.to(tl.int64)[:, None] * F + column[None, :], inside, ACC)
        u = load_as(x_ptr + at, inside, ACC)
        if HAS_BIAS:
            u += load_as(bias_ptr + column, here, ACC)[None, :]
        cdf = _cdf(u)
        if GATED:
            gate = load_as(x_ptr + at + F, inside, ACC)
            if HAS_BIAS:
                gate += load_as(bias_ptr + F + column, here, ACC)[None, :]
            dgate = slope * u * cdf
            store(dx_ptr + at + F, dgate, inside)
            if HAS_BIAS:
                dbias_gate += dgate
            slope = slope * gate
        slope = slope * (cdf + u * tl.exp(-0.5 * u * u) * 0.3989422804014327)
        store(dx_ptr + at, slope, inside)
        if HAS_BIAS:
            dbias += slope
    if HAS_BIAS:
        at = partial_ptr + tl.program_id(0).to(tl.int64) * WIDTH + column
        tl.store(at, tl.sum(dbias, 0), mask=here)
        if GATED:
            tl.store(at + F, tl.sum(dbias_gate, 0), mask=here)


def shipped() -> list[Shipped]:
    """BERT-base's feed-forward with bias, ModernBERT-base's gated one without, in bf16."""
    found = []
    for name, out, gated, bias in (("gelu 3072", 3072, False, True), ("geglu 1152", 1152, True, False)):
        flags = {"F": out, "GATED": gated, "HAS_BIAS": bias, "ROWS": ROWS, "BLOCK": BLOCK, "ACC": tl.float32}
        # an absent bias is a constant None to the compiler
        flags |= {} if bias else {"bias_ptr": None}
        given = {"dy_ptr": "*bf16", "x_ptr": "*bf16", "bias_ptr": "*fp32", "y_ptr": "*bf16", "dx_ptr": "*bf16"}
        given |= {"partial_ptr": "*fp32", "rows": "i32"}
        found.append(Shipped.of(f"{name} forward", _forward_kernel, given, flags))
        found.append(Shipped.of(f"{name} backward", _backward_kernel, given, flags, num_warps=8 if gated else 4))
    return found
