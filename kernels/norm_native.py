"""Dropout, residual sum and LayerNorm in C, on CPU (native_norm.c).

    z = dropout(x) + residual,   y = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias         (Ba et al. 2016)

Shape: x, residual [.., H], fp32 or bf16 -> y [.., H], in bf16 where both are; arithmetic in fp32; H a multiple of
16. Bytes moved in fp32: 12 a value forward, 20 backward; about 20 FLOPs a value, and 12 integer operations for its dropout
decision.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regraft.kernels import native
from regraft.kernels.native import at


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "half_x", "half_residual")),
        *((name, ctypes.c_float) for name in ("eps", "factor")),
        ("threshold", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
    ]


def runs_here(x: Tensor, residual: Tensor, weight: Tensor) -> bool:
    """Whether rows of these tensors are normalised in C."""
    return x.shape == residual.shape and x.shape[-1] % 16 == 0 and native.takes(x, residual, weight.detach())


def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, p: float
) -> Tensor:
    """LayerNorm(dropout(x) + residual), differentiable in the four tensors; the seed comes from torch's generator."""
    return _Norm.apply(x, residual, weight, bias, eps, p)


def _problem(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> _Problem:
    bias_at = None if bias is None else bias.data_ptr()
    rows, halves = x.numel() // x.shape[-1], [int(t.dtype == torch.bfloat16) for t in (x, residual)]
    return _Problem(
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), bias_at, rows, x.shape[-1], *halves, **options
    )


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, p: float
    ) -> Tensor:
        x, residual = x.contiguous(), residual.contiguous()
        ctx.options = {"eps": eps, **native.decisions(p)}
        ctx.dtypes = [w if w is None else w.dtype for w in (weight, bias)]
        weight, bias = weight.float(), None if bias is None else bias.float()
        ctx.save_for_backward(x, residual, weight, bias)
        y, threads = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype)), torch.get_num_threads()
        problem, scratch = _problem(x, residual, weight, bias, ctx.options), _numbers(threads, x.shape[-1])
        native.call("regraft_norm", ctypes.byref(problem), at(y), at(scratch), threads)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, weight, bias = ctx.saved_tensors
        width, threads, grad = x.shape[-1], torch.get_num_threads(), grad.contiguous()
        dx = torch.empty_like(x)
        # without dropout both are the same numbers
        apart = ctx.options["threshold"] or x.dtype != residual.dtype
        dresidual = torch.empty_like(residual) if apart else None
        frozen = not any(ctx.needs_input_grad[2:4])
        sums, scratch = None if frozen else _numbers(threads, 2, width).zero_(), _numbers(threads, 3, width)
        problem = _problem(x, residual, weight, bias, ctx.options)
        parts = map(at, (grad, dx, dresidual, sums, scratch))
        native.call("regraft_norm_backward", ctypes.byref(problem), *parts, threads)
        slopes: list[Tensor | None] = [None, None]
        if sums is not None:
            slopes = [None if dtype is None else s.to(dtype) for s, dtype in zip(sums[0], ctx.dtypes, strict=True)]
        return dx, dx if dresidual is None else dresidual, *slopes, None, None


def _numbers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)
