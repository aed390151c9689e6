"""Attention within each sequence of a packed row in C, on CPU (native_attention.c).

    out = dropout(softmax(scale * q k^T + mask)) v        for every sequence and head     (Vaswani et al. 2017)

Shape: q [M, H, D], k, v [T, H, D] -> [M, H, D], all fp32 or all bf16, arithmetic in fp32; D a multiple of 16. Sequence b has queries cu_q[b] to cu_q[b + 1] and
keys cu_k[b] to cu_k[b + 1]. FLOPs: 4 H D sum(m n), backward 2.5 times that (scores are made again); bytes moved: 4 (2 M
+ 2 T) H D in fp32, backward twice that: nothing of size m n reaches memory (Dao et al. 2022).
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
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "cu_q", "cu_k")),
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "d", "q_stride", "kv_stride")),
        *((name, ctypes.c_int64) for name in ("longest", "window", "half")),
        *((name, ctypes.c_float) for name in ("scale", "factor")),
        ("threshold", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("softmax", ctypes.c_void_p),
        ("result", ctypes.c_void_p),
        ("last", ctypes.c_int64),
    ]


def runs_here(size: int, *tensors: Tensor) -> bool:
    """Whether heads of `size` of these tensors are attended in C."""
    alike = len({x.dtype for x in tensors}) == 1
    return alike and size % 16 == 0 and native.takes(*tensors)


def merged_attention(
    qkv: Tensor, cu_seqlens: Tensor, longest: int, *, scale: float, dropout_p: float, window: int | None
) -> Tensor:
    """Every token attends to its own sequence: qkv [T, 3, H, D], cu_seqlens [B + 1] int32 -> [T, H, D]."""
    return _Merged.apply(qkv, cu_seqlens, longest, scale, dropout_p, window)


def separate_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest: int,
    *,
    scale: float,
    dropout_p: float,
    window: int | None = None,
) -> Tensor:
    """Queries of their own number a sequence: q [M, H, D], k, v [T, H, D] -> [M, H, D]. `longest`: keys of a sequence."""
    return _Separate.apply(q, k, v, (cu_q, cu_k), longest, scale, dropout_p, window)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: tuple[Tensor, Tensor],
    longest: int,
    softmax: Tensor,
    result: Tensor | None,
    options: dict[str, Any],
    *,
    last: bool = False,
) -> _Problem:
    return _Problem(
        *(x.data_ptr() for x in (q, k, v, *cu)),
        len(cu[0]) - 1,
        *q.shape[1:],
        q.stride(0),
        k.stride(0),
        longest,
        half=int(q.dtype == torch.bfloat16),
        softmax=softmax.data_ptr(),
        result=None if result is None else result.data_ptr(),
        last=int(last),
        **options,
    )


def _options(scale: float, p: float, window: int | None) -> dict[str, Any]:
    return {"window": -1 if window is None else window, "scale": scale, **native.decisions(p)}


def _call(problem: _Problem, grad: Tensor | None, *outputs: Tensor) -> None:
    rest = (None,) * (3 - len(outputs))
    code = native.call(
        "regraft_attention", ctypes.byref(problem), at(grad), *map(at, (*outputs, *rest)), torch.get_num_threads()
    )
    if code:
        raise MemoryError(f"no memory for the attention of sequences of {problem.longest} tokens")


def _attend(
    ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu: tuple[Tensor, Tensor], longest: int, *how: Any
) -> tuple[Tensor, Tensor]:
    # the result, and of each query and head what the backward needs of its softmax: the highest score and 1 / the sum
    ctx.options, ctx.longest = _options(*how), longest
    out, softmax = q.new_empty(q.shape), q.new_empty(*q.shape[:2], 2, dtype=torch.float32)
    # where no backward follows, C may take a shorter way
    last = not any(ctx.needs_input_grad)
    _call(_problem(q, k, v, cu, longest, softmax, None, ctx.options, last=last), None, out)
    return out, softmax


def _read_again(out: Tensor) -> Tensor | None:
    # the backward reads the result on tiles alone, which take bf16
    return out if out.dtype == torch.bfloat16 else None


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu: Tensor, longest: int, *how: Any) -> Tensor:
        qkv = qkv.contiguous()
        q, k, v = qkv.unbind(1)
        out, softmax = _attend(ctx, q, k, v, (cu, cu), longest, *how)
        ctx.save_for_backward(qkv, cu, _read_again(out), softmax)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cu, out, softmax = ctx.saved_tensors
        gradient = torch.empty_like(qkv)
        q, k, v = qkv.unbind(1)
        problem = _problem(q, k, v, (cu, cu), ctx.longest, softmax, out, ctx.options)
        _call(problem, grad.contiguous(), *gradient.unbind(1))
        return gradient, None, None, None, None, None


class _Separate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu: tuple[Tensor, Tensor], longest: int, *how: Any
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, softmax = _attend(ctx, q, k, v, cu, longest, *how)
        ctx.save_for_backward(q, k, v, *cu, _read_again(out), softmax)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cu_q, cu_k, out, softmax = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        _call(_problem(q, k, v, (cu_q, cu_k), ctx.longest, softmax, out, ctx.options), grad.contiguous(), *gradients)
        return *gradients, None, None, None, None, None
