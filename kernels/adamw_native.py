"""AdamW over all weights at once, and the square of the gradients' norm, in C, on CPU (native_adamw.c).

    p *= 1 - lr decay,   m += (1 - beta1) (g / scale - m),   v = beta2 v + (1 - beta2) (g / scale)^2
    p -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)                       (Loshchilov & Hutter 2019)

Shape: p, g, m, v of any one shape, contiguous, fp32; t []. Bytes moved: 28 a weight, 2 more for its copy in bf16; 4 a number
for the norm. The gradient stays as it is: torch's fused kernel writes g / scale back, another 4 bytes, which nobody reads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regraft.kernels import native
from regraft.kernels.native import at

CHUNK = 16384  # as in native_adamw.c


class _Weight(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("p", "g", "m", "v", "t", "half")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("lr", "decay", "beta1", "beta2", "eps")),
    ]


@dataclass(frozen=True, slots=True)
class Update:
    """A weight, and what its step needs."""

    weight: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float


def runs_here(tensors: Iterable[Tensor]) -> bool:
    """Whether these are contiguous in fp32 on CPU, none traced or of a type of its own, and plain torch is not forced."""
    plain = all(
        type(x) in (Tensor, nn.Parameter)
        and x.is_cpu
        and x.dtype == torch.float32
        and x.layout == torch.strided
        and x.is_contiguous()
        for x in tensors
    )
    return plain and not torch.compiler.is_compiling() and native.available()


def square_sum(tensors: Sequence[Tensor], others: Sequence[Sequence[Tensor]] = ()) -> float:
    """Sum of the squares of all numbers: in fp32 over chunks of them, in fp64 over those. `others`: as many tensors again, or
    several times as many, that are added to them first, in place."""
    chunks = sum(-(-x.numel() // CHUNK) for x in tensors)
    sums = torch.zeros(max(1, chunks), dtype=torch.float64)
    sizes = (ctypes.c_int64 * len(tensors))(*(x.numel() for x in tensors))
    threads = min(torch.get_num_threads(), max(1, chunks))  # none is woken up for a head of a few hundred numbers
    beside = [x for row in zip(*others, strict=True) for x in row]
    arrays = _places(tensors), _places(beside), len(others), sizes, len(tensors)
    native.call("regraft_square_sum", *arrays, at(sums), threads)
    return float(sums[0])


def _places(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


def adamw(updates: Sequence[Update], grad_scale: float = 1.0, halves: Sequence[Tensor | None] = ()) -> None:
    """One step of every weight, in place, its moments and its `step` [] with it; gradients are divided by `grad_scale`. `halves`: for
    each weight memory in bf16 to which the new one is written too, or None."""
    weights = (_Weight * len(updates))(*map(_weight, updates, halves or [None] * len(updates)))
    native.call("regraft_adamw", weights, len(updates), ctypes.c_float(grad_scale), torch.get_num_threads())


def _weight(u: Update, half: Tensor | None) -> _Weight:
    tensors = (u.weight, u.gradient, u.exp_avg, u.exp_avg_sq, u.step)
    places = [x.data_ptr() for x in tensors]
    beside = None if half is None else half.data_ptr()
    return _Weight(*places, beside, u.weight.numel(), u.lr, u.weight_decay, *u.betas, u.eps)
