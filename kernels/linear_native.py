"""Linear layers in C, on CPU: in bf16 by tiles (AMX, native_linear.c) or by vectors of pairs, in fp32 by vectors (AVX-512,
native_products.c).

    y = x W^T + b,   h = gelu(y)                       dx = dy W,   dW = dy^T x,   db = sum dy

Products with W may have a low-rank term added in the same sums: y + u B^T, dx + v A.

Shape: x [T, I], W [O, I], b [O], y, h and dy [T, O], all bf16 or all fp32; dW [O, I] and db [O] in fp32, as they were
added up. I and O are multiples of 32 on tiles and of `step` else, I of dW of 32 in any case; anything
else raises ValueError. 2 T I O FLOPs each; bytes moved, of n a number:
n (T I + T O + 2 O I) forward and for dx, 2 n (T I + T O) + 4 O I for dW.

fp32 is for processors that MKL, which multiplies for torch, does not know well: on two cores of an AMD EPYC with AVX-512 it reaches
185 to 208 GFLOP/s, these 329 to 450 (bench/products_cpu.py). On Intel's they are MKL's.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.kernels import native
from regraft.kernels.native import at

SIDE = 32  # rows and columns that are multiplied together, as in native_tiles.h
SHARE = 128  # rows whose sums are added up together, as in native_products.c; twice as many in native_linear.c
PART = 6 * SHARE  # rows that are packed at a time, as in native_products.c; native_linear.c packs all
FEW = 24  # rows
HALF = torch.bfloat16
TILES = ("regraft_linear", "regraft_linear_slopes", "regraft_gelu_slopes")
VECTORS = ("regraft_product", "regraft_slopes", "regraft_slopes_of_gelu")
LowRank = tuple[Tensor, Tensor] | None


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "bias", "out", "active", "more", "beside", "room")),
        *((name, ctypes.c_int64) for name in ("rows", "inner", "wide", "thin", "turned", "half")),
    ]


class _Slopes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("dy", "x", "dw", "db", "room")),
        *((name, ctypes.c_int64) for name in ("rows", "outputs", "inputs", "half")),
    ]


def runs_here(weight: Tensor) -> bool:
    """Whether products with this weight [O, I] are computed in C."""
    fits = weight.dim() == 2 and weight.numel() > 0 and not any(n % SIDE for n in weight.shape)
    return fits and native.takes(weight) and _form(weight.dtype) is not None


@cache
def _form(dtype: torch.dtype) -> tuple[str, str, str] | None:
    """The functions in C for products, gradients of weights, and of GELU."""
    if dtype == HALF and native.call("regraft_linear_here", 1):
        return TILES
    vectors = native.call("regraft_products_here", 1)
    if vectors == 2 if dtype == HALF else vectors and not _by_intel():
        return VECTORS
    return None


def step(weight: Tensor) -> int:
    """What ranks of low-rank terms with this weight are multiples of: 8, or a side of a tile."""
    return _step(weight.dtype)


def _step(dtype: torch.dtype) -> int:
    return SIDE if _form(dtype) is TILES else 8


def by_vectors(weight: Tensor) -> bool:
    """Whether products with this weight [O, I] are computed in C, and by vectors."""
    return runs_here(weight) and _form(weight.dtype) is VECTORS


def _by_intel() -> bool:
    with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as about:
        return any(line.startswith("vendor_id") and "GenuineIntel" in line for line in about)


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether products of x [.., I] with this weight [O, I], both fp32, are faster in C than torch's."""
    if not runs_here(weight):  # asked first: of a traced x the number of rows is not known
        return False
    enough = x.shape[:-1].numel() >= FEW  # for each product the weight is packed anew
    return enough and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"


def as_rows(x: Tensor, dtype: torch.dtype = HALF) -> Tensor:
    """[.., I] -> [rows, I] in `dtype`."""
    return x.reshape(-1, x.shape[-1]).to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, low: LowRank = None) -> Tensor:
    """x W^T + b, and + u B^T of `low`, which is (u, B). Shape: x [T, I], weight [O, I], bias [O], u [T, R], B [O, R] -> [T, O],
    all of one type; R a multiple of `step`."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    _product(x, weight, bias, low, out, None, turned=True)
    return out


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: LowRank = None, *, keep: bool = True
) -> tuple[Tensor | None, Tensor]:
    """y = x W^T + b, with `low` as `linear`, and gelu(y), by erf. Shape: as `linear`, twice; y is None unless `keep`."""
    active = x.new_empty(x.shape[0], weight.shape[0])
    out = torch.empty_like(active) if keep else None
    _product(x, weight, bias, low, out, active, turned=True)
    return out, active


def input_gradient(dy: Tensor, weight: Tensor, low: LowRank = None) -> Tensor:
    """dy W, and + v A of `low`, which is (v, A). Shape: dy [T, O], weight [O, I], v [T, R], A [R, I] -> [T, I]."""
    out = dy.new_empty(dy.shape[0], weight.shape[1])
    _product(dy, weight, None, low, out, None, turned=False)
    return out


def weight_gradients(dy: Tensor, x: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """dy^T x and, where `bias`, the sum of dy's rows. Shape: dy [T, O], x [T, I] -> [O, I], [O] in fp32."""
    dy, x = dy.contiguous(), x.contiguous()
    (rows, outputs), inputs = dy.shape, x.shape[1]
    _expect("x", x, (rows, inputs), dy.dtype, SIDE)
    _expect("dy", dy, (rows, outputs), dy.dtype, SIDE if bias else None)
    dw = dy.new_empty(outputs, inputs, dtype=torch.float32)
    db = dy.new_empty(outputs, dtype=torch.float32) if bias else None
    held = rows if _form(dy.dtype) is TILES else min(rows, PART)
    packed = -(-held // SIDE) * SIDE * (outputs + SIDE + inputs) * dy.element_size()
    room = dy.new_empty(packed + 4 * -(-rows // SHARE) * outputs, dtype=torch.uint8)
    addresses = (None if t is None else t.data_ptr() for t in (dy, x, dw, db, room))
    problem = _Slopes(*addresses, rows, outputs, inputs, int(dy.dtype == HALF))
    _call(1, dy.dtype, ctypes.byref(problem))
    return dw, db


def gelu_gradient(dh: Tensor, y: Tensor) -> Tensor:
    """dh times gelu's slope at y. Shape: dh, y [T, O] -> [T, O]."""
    dh, y = dh.contiguous(), y.contiguous()
    _expect("dh", dh, tuple(y.shape), dh.dtype)
    _expect("y", y, tuple(y.shape), dh.dtype)
    dy = torch.empty_like(dh)
    _call(2, dh.dtype, at(dh), at(y), at(dy), dh.numel(), int(dh.dtype == HALF))
    return dy


def _product(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: LowRank,
    out: Tensor | None,
    active: Tensor | None,
    *,
    turned: bool,
) -> None:
    a, weight = a.contiguous(), weight.contiguous()
    inner, wide = reversed(weight.shape) if turned else weight.shape
    rows, thin = a.shape[0], 0
    kind = weight.dtype
    _expect("x" if turned else "dy", a, (rows, inner), kind)
    _expect("weight", weight, (wide, inner) if turned else (inner, wide), kind)
    if wide % _step(kind):
        _expect("weight", weight.T, tuple(weight.T.shape), kind)  # raises
    more = beside = None
    if low is not None:
        more, beside = (part.contiguous() for part in low)
        thin = more.shape[-1]
        _expect("low[0]", more, (rows, thin), kind)
        _expect("low[1]", beside, (wide, thin) if turned else (thin, wide), kind)
    if bias is not None:
        bias = bias.contiguous()
        _expect("bias", bias, (wide,), kind)
    room = a.new_empty((inner + thin) * (-(-wide // SIDE) + 1) * SIDE)
    addresses = [None if t is None else t.data_ptr() for t in (a, weight, bias, out, active, more, beside, room)]
    problem = _Product(*addresses, rows, inner, wide, thin, turned, kind == HALF)
    _call(0, kind, ctypes.byref(problem))


def expect_part(name: str, x: Tensor, shape: tuple[int, ...], kind: torch.dtype) -> None:
    """Raises ValueError for a part of a product that is of another shape or type, not in one piece, or of a size that C does not take."""
    _expect(name, x, shape, kind)
    if not x.is_contiguous():
        raise ValueError(f"{name}: has strides {list(x.stride())}, expected a contiguous tensor")


def _expect(name: str, x: Tensor, shape: tuple[int, ...], kind: torch.dtype, whole: int | None = None) -> None:
    # raw addresses go to C: another shape would read what is not there
    if x.dtype != kind or kind not in native.TYPES or not x.is_cpu or x.shape != shape:
        found = f"{list(x.shape)} in {x.dtype} on {x.device.type}"
        raise ValueError(f"{name}: is {found}, expected {list(shape)} in {kind} on cpu")
    whole = whole or _step(kind)
    if not x.shape[-1] or x.shape[-1] % whole:
        raise ValueError(f"{name}: last dimension is {x.shape[-1]}, expected a multiple of {whole}")


def _call(which: int, kind: torch.dtype, *arguments: Any) -> None:
    form = _form(kind)
    if form is None:
        raise RuntimeError(f"products in {kind} are not computed in C on this processor")
    if native.call(form[which], *arguments, torch.get_num_threads()):
        raise RuntimeError(f"{form[which]}: this process may not use the processor's tiles")
