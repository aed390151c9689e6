"""Triton's names for the kernel files, and what its interpreter gets wrong, handled here and nowhere else.

A machine without Triton can import every kernel file: `jit` then leaves the function alone, and `choice` never
launches one.

Under TRITON_INTERPRET=1 (set before Triton is imported) kernels run on CPU through numpy, where
- bf16 arithmetic and bf16 `tl.dot` are silently wrong: after every load a value goes through `load_as` or
  `.to(ACC)`, and matrix products through `dot`;
- fp32 to bf16 truncates: `round_to` rounds to nearest even by its bits, and keeps the rounded value in fp32, so that
  the truncating store that follows is exact;
- libdevice is missing: `tanh` is made of sigmoid. `tl.erf` and `tl.exp` are there.
Masked loads always name `other`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # macOS, Windows, torch without CUDA
    triton = tl = None
    HAS_TRITON = False

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
INTERPRETED: Any = tl.constexpr(IS_INTERPRETED) if HAS_TRITON else IS_INTERPRETED

# Interpreted, a program costs by its operations and not by its values: it gets more rows.
MORE_ROWS = 16 if IS_INTERPRETED else 1


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, where there is Triton."""
    return triton.jit(function) if HAS_TRITON else function


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def block_of(width: int) -> int:
    """Columns of a program that holds whole rows; dropout draws for eight at once."""
    return max(8, next_power_of_2(width))


def processors(device: Any) -> int:
    """Multiprocessors of a CUDA device; 2 elsewhere. Kernels that sum over rows start a few programs for each."""
    import torch

    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@jit
def load_as(pointer, mask, ACC: tl.constexpr):
    """Masked load, 0 outside, in the dtype the kernel calculates in."""
    return tl.load(pointer, mask=mask, other=0.0).to(ACC)


@jit
def round_to(x, DTYPE: tl.constexpr):
    """x rounded to DTYPE, to nearest even. Compiled: of that dtype. Interpreted: bf16 stays fp32 with 16 low bits 0."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@jit
def store(pointer, x, mask):
    """Masked store, rounded to nearest even to what the pointer points to."""
    tl.store(pointer, round_to(x, pointer.dtype.element_ty).to(pointer.dtype.element_ty), mask=mask)


@jit
def dot(a, b, ACC: tl.constexpr):
    """a @ b, summed in ACC; fp32 operands in full fp32, never tf32."""
    if INTERPRETED:
        return tl.dot(a.to(ACC), b.to(ACC), out_dtype=ACC)
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACC)


@jit
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


def accumulate(dtype: Any) -> Any:
    """What a kernel calculates in for inputs of a torch dtype: fp32, or fp64 for fp64 (gradcheck under the interpreter)."""
    import torch

    return tl.float64 if dtype == torch.float64 else tl.float32
