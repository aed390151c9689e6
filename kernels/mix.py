"""Scalar mix: a learned weighted sum of layers.

    y = sum_j c_j n(h_j),   c = gamma softmax(w),   n = identity, or (h - mean) / sqrt(var + eps) for each row
                                                                                    (Peters et al. 2018, equation 1)
    dc_j = sum (dy . n(h_j)),   dh_j = c_j n'(dy),   softmax and gamma by autograd on L numbers

Shape: L layers [T, H] each -> [T, H]. Sums in fp32 (fp64 for fp64). Each layer is read once and y written once; backward
reads dy and the layers once and writes a layer's gradient only where it is asked for, which frozen features do not.
Nothing of size L x T x H is made. Bound by memory: 2 FLOPs a value read (8 with normalisation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regraft.kernels.checks import expect
from regraft.kernels.choice import use_triton
from regraft.kernels.lang import MORE_ROWS, accumulate, cdiv, jit, load_as, next_power_of_2, processors, store, tl
from regraft.kernels.shipped import Shipped

LARGEST = 8192  # width of a layer that one program holds
TILE = 4096
BACKWARD_WARPS = 8
_CACHED = 1 << 16  # values a CPU pass works on at a time: the running sum stays in a core's cache


def scalar_mix(
    layers: Tensor | Sequence[Tensor], weights: Tensor, gamma: Tensor, *, normalise: bool = False, eps: float = 1e-12
) -> Tensor:
    """gamma * sum_j softmax(weights)_j n(layers[j]), differentiable in all three.

    Shape: layers [L, T, H] (a view whose last dimension is contiguous is taken as it is, e.g. of [T, L, H]), or L tensors
    [T, H]; weights [L]; gamma [] or [1] -> [T, H]. Raises ValueError or TypeError, naming the argument.
    """
    parts = list(layers.unbind(0)) if isinstance(layers, Tensor) and layers.dim() else list(layers)
    if not parts:
        raise ValueError("layers: is empty, expected at least one layer")
    expect("layers[0]", parts[0], shape=(None, None), contiguous=False)
    for j, part in enumerate(parts):
        expect(f"layers[{j}]", part, shape=parts[0].shape, dtype=parts[0].dtype, like=parts[0], contiguous=False)
    expect("weights", weights, shape=(len(parts),), like=parts[0])
    expect("gamma", gamma, shape=(1,) if gamma.dim() else (), like=parts[0])
    if parts[0].shape[1] > LARGEST:
        raise ValueError(f"layers[0]: rows hold {parts[0].shape[1]} values, expected at most {LARGEST}")
    wide = _wide(parts[0])
    coefficients = torch.softmax(weights.to(wide), 0) * gamma.to(wide)
    return _mix([x if x.stride(-1) == 1 else x.contiguous() for x in parts], coefficients, normalise, eps)


def reference(
    layers: Sequence[Tensor], weights: Tensor, gamma: Tensor, *, normalise: bool = False, eps: float = 1e-12
) -> Tensor:
    """The same in plain torch, every step in the layers' dtype."""
    shares = torch.softmax(weights, 0)
    n = [torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps) if normalise else x for x in layers]
    return gamma * sum((s * x for s, x in zip(shares, n, strict=True)), torch.zeros_like(n[0]))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt_()
    return centred.mul_(rstd), rstd


def _blocks(x: Tensor) -> list[slice]:
    step = max(1, _CACHED // max(1, x.shape[1])) if x.device.type == "cpu" else max(1, x.shape[0])
    return [slice(i, min(i + step, x.shape[0])) for i in range(0, x.shape[0], step)]


@torch.library.custom_op("regraft::scalar_mix", mutates_args=())
def _mix(layers: Sequence[Tensor], coefficients: Tensor, normalise: bool, eps: float) -> Tensor:
    x = layers[0]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if use_triton(x):
        if y.numel():
            base, layer_stride, row_stride = _stacked(layers)
            tile = _rows(x.shape[1])
            _mix_kernel[(cdiv(x.shape[0], tile),)](
                base, coefficients, y, x.shape[0], layer_stride, row_stride, len(layers), eps, H=x.shape[1],
                BLOCK=next_power_of_2(x.shape[1]), ROWS=tile, NORMALISE=normalise, ACC=accumulate(x.dtype),
            )  # fmt: skip
        return y
    shares = coefficients.tolist()
    for block in _blocks(x):
        total = torch.zeros(x[block].shape, dtype=_wide(x), device=x.device)
        for share, layer in zip(shares, layers, strict=True):
            part = layer[block].to(total.dtype)
            total.add_(_normalised(part, eps)[0] if normalise else part, alpha=share)
        y[block] = total
    return y


@_mix.register_fake
def _(layers: Sequence[Tensor], coefficients: Tensor, normalise: bool, eps: float) -> Tensor:
    return layers[0].new_empty(layers[0].shape)


@torch.library.custom_op("regraft::scalar_mix_backward", mutates_args=())
def _mix_backward(
    dy: Tensor, layers: Sequence[Tensor], coefficients: Tensor, normalise: bool, eps: float, into_layers: bool
) -> tuple[Tensor, Tensor]:
    """dc [L]; the layers' gradients [L, T, H], empty unless `into_layers`."""
    count, (rows, width) = len(layers), dy.shape
    wide = _wide(dy)
    dx = torch.empty((count, rows, width) if into_layers else (0,), dtype=dy.dtype, device=dy.device)
    if use_triton(dy):
        if not dy.numel():
            return torch.zeros(count, dtype=wide, device=dy.device), dx
        base, layer_stride, row_stride = _stacked(layers)
        tile = _rows(width)
        programs = min(cdiv(rows, tile), 4 * processors(dy.device))
        block = next_power_of_2(count)
        partial = torch.empty(programs, block, dtype=wide, device=dy.device)
        _mix_backward_kernel[(programs,)](
            dy, base, coefficients, dx, partial, rows, layer_stride, row_stride, count, eps, H=width,
            BLOCK=next_power_of_2(width), ROWS=tile, LAYERS=block, NORMALISE=normalise, INTO_LAYERS=into_layers,
            ACC=accumulate(dy.dtype), num_warps=BACKWARD_WARPS,
        )  # fmt: skip
        return partial.sum(0, dtype=torch.float64)[:count].to(wide), dx
    shares = coefficients.tolist()
    sums = torch.zeros(count, dtype=torch.float64, device=dy.device)
    for part in _blocks(dy):
        g = dy[part].to(wide)
        for j, (share, layer) in enumerate(zip(shares, layers, strict=True)):
            n = layer[part].to(wide)
            if normalise:
                n, rstd = _normalised(n, eps)
            product = g * n
            sums[j] += product.sum()
            if not into_layers:
                continue
            if normalise:
                slope = g - n * product.mean(-1, keepdim=True) - g.mean(-1, keepdim=True)
                dx[j, part] = slope.mul_(rstd).mul_(share)
            else:
                dx[j, part] = g * share
    return sums.to(wide), dx


@_mix_backward.register_fake
def _(
    dy: Tensor, layers: Sequence[Tensor], coefficients: Tensor, normalise: bool, eps: float, into_layers: bool
) -> tuple[Tensor, Tensor]:
    dx = dy.new_empty((len(layers), *dy.shape) if into_layers else (0,))
    return coefficients.new_empty(len(layers), dtype=_wide(dy)), dx


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    layers, coefficients, normalise, eps = inputs
    ctx.save_for_backward(coefficients, *layers)
    ctx.normalise, ctx.eps = normalise, eps
    ctx.into_layers = any(x.requires_grad for x in layers)


def _gradients(ctx: Any, dy: Tensor) -> tuple:
    coefficients, *layers = ctx.saved_tensors
    dc, dx = _mix_backward(dy.contiguous(), layers, coefficients, ctx.normalise, ctx.eps, ctx.into_layers)
    return (list(dx.unbind(0)) if ctx.into_layers else [None] * len(layers)), dc, None, None


_mix.register_autograd(_gradients, setup_context=_setup)


def _stacked(layers: Sequence[Tensor]) -> tuple[Tensor, int, int]:
    # layers that lie in one storage at equal distances are read where they are
    first = layers[0]
    step = int(layers[1].storage_offset() - first.storage_offset()) if len(layers) > 1 else 0
    if all(
        x.stride() == first.stride()
        and x.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and x.storage_offset() - first.storage_offset() == j * step
        for j, x in enumerate(layers)
    ):
        return first, step, int(first.stride(0))
    base = torch.stack([x.contiguous() for x in layers])
    rows, width = first.shape
    return base, rows * width, width


def _rows(width: int) -> int:
    return max(1, TILE // next_power_of_2(width)) * MORE_ROWS


@jit
def _mix_kernel(
    x_ptr, c_ptr, y_ptr, rows, layer_stride, row_stride, layers, eps, H: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, NORMALISE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    here = column < H
    inside = (row < rows)[:, None] & here[None, :]
    at = x_ptr + row.to(tl.int64)[:, None] * row_stride + column[None, :]
    total = tl.zeros([ROWS, BLOCK], dtype=ACC)
    for j in range(layers):
        x = load_as(at, inside, ACC)
        if NORMALISE:
            x = tl.where(inside, x - (tl.sum(x, 1) / H)[:, None], 0.0)
            x = x * (1.0 / tl.sqrt(tl.sum(x * x, 1) / H + eps))[:, None]
        total += tl.load(c_ptr + j) * x
        at += layer_stride
    store(y_ptr + row.to(tl.int64)[:, None] * H + column[None, :], total, inside)


@jit
def _mix_backward_kernel(
    dy_ptr, x_ptr, c_ptr, dx_ptr, partial_ptr, rows, layer_stride, row_stride, layers, eps, H: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, LAYERS: tl.constexpr, NORMALISE: tl.constexpr,
    INTO_LAYERS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    number = tl.arange(0, LAYERS)
    here = column < H
    sums = tl.zeros([LAYERS], dtype=ACC)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & here[None, :]
        dy = load_as(dy_ptr + row[:, None] * H + column[None, :], inside, ACC)
        at = x_ptr + row[:, None] * row_stride + column[None, :]
        out = dx_ptr + row[:, None] * H + column[None, :]
        mean_dy = tl.sum(dy, 1) / H
        for j in range(layers):
            x = load_as(at, inside, ACC)
            slope = dy
            if NORMALISE:
                x = tl.where(inside, x - (tl.sum(x, 1) / H)[:, None], 0.0)
                rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / H + eps)
                x = x * rstd[:, None]
            along = tl.sum(dy * x, 1)
            sums += tl.where(number == j, tl.sum(along, 0), 0.0)
            if INTO_LAYERS:
                if NORMALISE:
                    slope = (dy - x * (along / H)[:, None] - mean_dy[:, None]) * rstd[:, None]
                store(out, slope * tl.load(c_ptr + j), inside)
                out += tl.cast(rows, tl.int64) * H
            at += layer_stride
    tl.store(partial_ptr + program * LAYERS + number, sums)


def shipped() -> list[Shipped]:
    """13 layers of 768 (BERT-base with its embeddings) in bf16, plain and normalised."""
    found = []
    scalars = {"rows": "i32", "layer_stride": "i64", "row_stride": "i32", "layers": "i32", "eps": "fp32"}
    pointers = {
        "x_ptr": "*bf16",
        "c_ptr": "*fp32",
        "y_ptr": "*bf16",
        "dy_ptr": "*bf16",
        "dx_ptr": "*bf16",
        "partial_ptr": "*fp32",
    }
    aligned = ("layer_stride", "row_stride")
    for normalise in (False, True):
        constants = {"H": 768, "BLOCK": 1024, "ROWS": TILE // 1024, "NORMALISE": normalise, "ACC": tl.float32}
        name = "scalar mix normalised" if normalise else "scalar mix"
        found.append(Shipped.of(name, _mix_kernel, {**pointers, **scalars}, constants, aligned=aligned))
        backward = {**constants, "LAYERS": 16, "INTO_LAYERS": True}
        found.append(
            Shipped.of(
                f"{name} backward",
                _mix_backward_kernel,
                {**pointers, **scalars},
                backward,
                num_warps=BACKWARD_WARPS,
                aligned=aligned,
            )
        )
    return found
