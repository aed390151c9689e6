"""A frozen linear layer with a low-rank update, forward and backward in one call of C each (native_products.c), on CPU.

    u = x A^T,   y = x W^T + u B^T + b,   h = gelu(y)
    dy = dh gelu'(y),   v = dy B,   dx = dy W + v A,   dA = v^T x,   dB = scale dy^T u

The products are those of linear_native.py by vectors; one call spares the seven others their way through Python, which takes as long as
the thin ones themselves. Shape: x [T, I], W [O, I], b [O], A [R, I], B [O, R], u and v [T, R], y, h, dy and dh [T, O], all bf16
or all fp32; dA [R, I] and dB [O, R] in fp32. I and O are multiples of 32, R of 8. FLOPs: 2 T (I O + R (I + O)) each way,
and as many as 4 T R (I + O) more backward; bytes moved as in linear_native.py.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from regraft.kernels import native
from regraft.kernels.linear_native import PART, SIDE, by_vectors, expect_part


class _Lora(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "down", "up", "inner", "out", "active")),
        *((name, ctypes.c_void_p) for name in ("dy", "slopes", "back", "dx", "d_down", "d_up", "room", "d_turned")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "rank", "half")),
        ("scale", ctypes.c_float),
    ]


def runs_here(weight: Tensor) -> bool:
    """Whether layers with this weight [O, I] are computed so."""
    return by_vectors(weight)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, *, gelu: bool, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """u; y, where there is GELU None unless `keep`; and y or its GELU."""
    x = x.contiguous()
    rows, rank = x.shape[0], down.shape[0]
    outputs, inputs = weight.shape
    inner, active = x.new_empty(rows, rank), x.new_empty(rows, outputs)
    out = active if not gelu else torch.empty_like(active) if keep else None
    given = {"x": x, "weight": weight, "bias": bias, "down": down, "up": up}
    _check(given, rows, inputs, outputs, rank, weight.dtype)
    made = {"inner": inner, "out": out, "active": active if gelu else None}
    _call("regraft_lora", given | made, weight, rows, rank, 1.0)
    return inner, out, active


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    inner: Tensor,
    out: Tensor | None,
    *,
    inputs: bool,
    scale: float,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx, None unless `inputs`; dA; dB. `inner`: u. `out`: y, where dy is of its GELU."""
    dy = dy.contiguous()
    rows, rank = x.shape[0], down.shape[0]
    given = {"dy": dy, "x": x, "weight": weight, "down": down, "up": up, "inner": inner, "out": out}
    _check(given, rows, weight.shape[1], weight.shape[0], rank, weight.dtype)
    outputs, width = weight.shape
    shapes = (rank, width), (outputs, rank), (rank, outputs)
    d_down, d_up, d_turned = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    dx = torch.empty_like(x) if inputs else None
    made = {"slopes": None if out is None else torch.empty_like(dy), "back": torch.empty_like(inner), "dx": dx}
    made |= {"d_down": d_down, "d_up": d_up, "d_turned": d_turned}
    _call("regraft_lora_slopes", given | made, weight, rows, rank, scale)
    return dx, d_down, d_up


def _check(given: dict[str, Tensor | None], rows: int, inputs: int, outputs: int, rank: int, kind: torch.dtype) -> None:
    shapes = {"x": (rows, inputs), "weight": (outputs, inputs), "bias": (outputs,), "down": (rank, inputs)}
    shapes |= {"up": (outputs, rank), "inner": (rows, rank), "out": (rows, outputs), "dy": (rows, outputs)}
    for name, part in given.items():
        if part is not None:
            expect_part(name, part, shapes[name], kind)


def _call(name: str, parts: dict[str, Tensor | None], weight: Tensor, rows: int, rank: int, scale: float) -> None:
    outputs, inputs = weight.shape
    widest, held = max(inputs, outputs), min(rows, PART) + SIDE
    # what the largest product packs; what the gradient of a factor does, of more ranks than are summed at once
    room = weight.new_empty(max((inputs + outputs + rank) * (widest + 2 * SIDE), held * (rank + 2 * SIDE + widest)))
    parts["room"] = room
    places: dict[str, Any] = {key: part.data_ptr() for key, part in parts.items() if part is not None}
    problem = _Lora(
        **places, rows=rows, inputs=inputs, outputs=outputs, rank=rank, half=weight.itemsize == 2, scale=scale
    )
    native.call(name, ctypes.byref(problem), torch.get_num_threads())
