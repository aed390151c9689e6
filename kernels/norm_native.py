"""Dropout, residual sum and LayerNorm in C, on CPU in fp32 (native_norm.c).

    z = dropout(x) + residual,   y = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias         (Ba et al. 2016)

Shape: x, residual [.., H] -> y [.., H]; H a multiple of 16. Bytes moved: 12 a value forward, 20 backward; about 20 FLOPs
a value and 12 integer operations for its dropout decision.
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
        *((name, ctypes.c_int64) for name in ("rows", "width")),
        *((name, ctypes.c_float) for name in ("eps", "factor")),
        ("threshold", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
    ]


def runs_here(x: Tensor, residual: Tensor, weight: Tensor) -> bool:
    """Whether rows of these tensors are normalised in C."""
    plain = (x, residual, weight.detach())
    return x.shape == residual.shape and x.shape[-1] % 16 == 0 and native.takes(*plain)


def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, p: float
) -> Tensor:
    """LayerNorm(dropout(x) + residual), differentiable in the four tensors; the seed comes from torch's generator."""
    return _Norm.apply(x, residual, weight, bias, eps, p)


def _problem(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> _Problem:
    bias_at = None if bias is None else bias.data_ptr()
    rows = x.numel() // x.shape[-1]
    return _Problem(
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), bias_at, rows=rows, width=x.shape[-1], **options
    )


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, p: float
    ) -> Tensor:
        x, residual = x.contiguous(), residual.contiguous()
        ctx.options = {"eps": eps, **native.decisions(p)}
        ctx.save_for_backward(x, residual, weight, bias)
        y = torch.empty_like(x)
        problem = _problem(x, residual, weight, bias, ctx.options)
        native.call("regraft_norm", ctypes.byref(problem), at(y), torch.get_num_threads())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, weight, bias = ctx.saved_tensors
        width, threads, grad = x.shape[-1], torch.get_num_threads(), grad.contiguous()
        dx = torch.empty_like(x)
        # without dropout both are the same numbers
        dresidual = torch.empty_like(x) if ctx.options["threshold"] else None
        sums, scratch = x.new_zeros(threads, 2, width), x.new_empty(threads, 3, width)
        problem = _problem(x, residual, weight, bias, ctx.options)
        parts = map(at, (grad, dx, dresidual, sums, scratch))
        native.call("regraft_norm_backward", ctypes.byref(problem), *parts, threads)
        dweight, dbias = sums[0].unbind()
        return dx, dx if dresidual is None else dresidual, dweight, None if bias is None else dbias, None, None
