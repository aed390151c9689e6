"""Argument checks before any launch: one clear error, naming the argument.

A tensor on the wrong device or with the wrong strides does not fail in a kernel, it reads other memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def expect(
    name: str,
    x: Tensor,
    *,
    shape: Sequence[int | None] | None = None,
    dtype: torch.dtype | Sequence[torch.dtype] = FLOATS,
    like: Tensor | None = None,
    contiguous: bool = True,
) -> None:
    """Refuse a tensor that a kernel does not take. `shape`: None matches any size; `like`: must share its device.

    Raises ValueError (TypeError for a dtype).
    """
    allowed = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
    if x.dtype not in allowed:
        raise TypeError(f"{name}: dtype is {_short(x.dtype)}, expected {' or '.join(map(_short, allowed))}")
    if shape is not None:
        wrong = len(shape) != x.dim() or any(s is not None and s != n for s, n in zip(shape, x.shape, strict=False))
        if wrong:
            wanted = ", ".join("any" if s is None else str(s) for s in shape)
            raise ValueError(f"{name}: shape is {list(x.shape)}, expected [{wanted}]")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: is on {x.device}, expected {like.device}")
    if contiguous and not x.is_contiguous():
        raise ValueError(f"{name}: strides are {list(x.stride())}, expected a contiguous tensor of {list(x.shape)}")


def expect_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside [low, high). Raises ValueError."""
    if not low <= value < high:
        raise ValueError(f"{name}: is {value}, expected in [{low:g}, {high:g})")


def expect_cu_seqlens(name: str, x: Tensor, like: Tensor) -> None:
    """cu_seqlens [B + 1] int32 on the device of `like`; that it starts at 0 and rises is not read from the device."""
    expect(name, x, shape=(None,), dtype=torch.int32, like=like)
    if x.shape[0] < 1:
        raise ValueError(f"{name}: is empty, expected [sequences + 1]")


def expect_bounds(name: str, x: Tensor, rows: int, longest: int | None = None) -> None:
    """Refuse bounds [B + 1] of segments that do not go from 0 to `rows` without falling, or of one longer than `longest`.

    Only on CPU: they are not read from a device. Raises ValueError.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    first, last = int(x[0]), int(x[-1])
    if (first, last) != (0, rows):
        raise ValueError(f"{name}: is {first} to {last}, expected 0 to {rows}, the number of rows")
    sizes = x.diff()
    if bool((sizes < 0).any()):
        raise ValueError(f"{name}: falls after sequence {int((sizes < 0).int().argmax())}, expected never to fall")
    if longest is not None and bool((sizes > longest).any()):
        raise ValueError(
            f"max_seqlen: is {longest}, and sequence {int(sizes.argmax())} of {name} has {int(sizes.max())}"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
