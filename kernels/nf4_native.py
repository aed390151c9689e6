"""Weights stored in 4 bits made whole in C, on CPU (native_nf4.c); formula and shapes are those of nf4.py.

Bytes moved: half a byte in and 2 or 4 out a value.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from regraft.kernels import native


class _Packed(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("packed", "code", "absmax", "absmax2", "code2", "offset", "out")),
        *((name, ctypes.c_int64) for name in ("count", "block", "block2", "half")),
    ]


def runs_here(packed: Tensor, dtype: torch.dtype) -> bool:
    """Whether a weight packed in this memory is made whole in C."""
    return packed.is_cpu and dtype in native.TYPES and native.available()


def dequantise(
    packed: Tensor,
    code: Tensor,
    absmax: Tensor,
    again: tuple[Tensor, Tensor, Tensor] | None,
    shape: tuple[int, int],
    blocks: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """The weight [O, I] of `shape`. `code` [16]; `again`: absmax2, code2 and offset where absmax is quantised; `blocks`: values
    of a block, and blocks of a block of those. All contiguous, as NF4Weight has them."""
    out = torch.empty(shape, dtype=dtype)
    parts = (packed, code, absmax, *(again or (None, None, None)), out)
    places = (None if part is None else part.data_ptr() for part in parts)
    problem = _Packed(*places, shape[0] * shape[1], *blocks, dtype == torch.bfloat16)
    native.call("regraft_nf4", ctypes.byref(problem), torch.get_num_threads())
    return out
