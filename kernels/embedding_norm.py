"""The embeddings of a BERT-like encoder in one pass: word + position + type, LayerNorm, dropout.

    z = word[id] + position[pos] + type[t],   y = dropout(LayerNorm(z) * weight + bias)         (Devlin et al. 2018)

Shape: ids, positions, types [T] int64; tables [V, H], [P, H], [K, H] -> y [T, H]. Forward: 3 values an element read,
one written; backward: dy and the rows again, one fp32 value an element written, and read back once a table. Bound by
memory. The gradients of word and position rows are summed run by run over the sorted indices, each by one program in
the order of the tokens; that of the few types is a matrix product: no atomics, the same bits in every run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.kernels.checks import expect, expect_range
from regraft.kernels.choice import use_triton
from regraft.kernels.dropout import scale_of
from regraft.kernels.lang import (
    MORE_ROWS,
    accumulate,
    block_of,
    cdiv,
    jit,
    load_as,
    next_power_of_2,
    processors,
    store,
    tl,
)
from regraft.kernels.philox import keep_mask, keep_tile, resolve_seed, threshold_of
from regraft.kernels.shipped import Shipped

LARGEST = 16384
TILE = 4096
RUN = 16  # rows of a run that are summed at once


def embedding_layer_norm(
    ids: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word: Tensor,
    position: Tensor,
    type_table: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-12,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    padding_idx: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """dropout(LayerNorm(word[ids] + position[positions] + type_table[types])), differentiable in tables, weight, bias.

    Shape: ids, positions, types [T] int64 -> [T, H] in `out_dtype` (default: the tables' own). The row `padding_idx` of
    the word table gets no gradient. That indices lie within the tables is not read from the device. Raises ValueError or
    TypeError for what a kernel does not take.
    """
    expect("word", word, shape=(None, None))
    width = word.shape[1]
    expect_range("word.shape[1]", width, 1, LARGEST + 1)
    expect("ids", ids, shape=(None,), dtype=torch.int64, like=word)
    expect("positions", positions, shape=ids.shape, dtype=torch.int64, like=word)
    expect("position", position, shape=(None, width), dtype=word.dtype, like=word)
    if (types is None) != (type_table is None):
        raise ValueError(f"{'types' if types is None else 'type_table'}: is None, expected both or neither")
    if types is not None and type_table is not None:
        expect("types", types, shape=ids.shape, dtype=torch.int64, like=word)
        expect("type_table", type_table, shape=(None, width), dtype=word.dtype, like=word)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None:
            expect(name, x, shape=(width,), like=word)
    seed = resolve_seed(seed, p, word.device)
    pad = -1 if padding_idx is None else padding_idx
    dtype = out_dtype or word.dtype
    tensors = (ids, positions, types, word, position, type_table, weight, bias)
    return _forward(*tensors, seed, p, site, eps, pad, dtype)[0]


def reference(
    ids: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word: Tensor,
    position: Tensor,
    type_table: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-12,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    padding_idx: int | None = None,
) -> Tensor:
    """The same in plain torch, every step in the tables' dtype."""
    look_up = torch.nn.functional.embedding
    z = look_up(ids, word, padding_idx) + look_up(positions, position)
    z = z if types is None or type_table is None else z + look_up(types, type_table)
    y = torch.nn.functional.layer_norm(z, word.shape[1:], weight, bias, eps)
    if seed is not None and threshold_of(p):
        y = y * _keep(ids, word.shape[1], seed, p, site) * scale_of(p)
    return y


def _keep(ids: Tensor, width: int, seed: Tensor, p: float, site: int) -> Tensor:
    return keep_mask(seed, torch.arange(ids.shape[0], device=ids.device), width, p, site=site)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _summed(ids: Tensor, positions: Tensor, types: Tensor | None, word: Tensor, position: Tensor, kinds: Any) -> Tensor:
    wide = _wide(word.dtype)
    z = word[ids].to(wide) + position[positions].to(wide)
    return z if types is None else z + kinds[types].to(wide)


@torch.library.custom_op("regraft::embedding_forward", mutates_args=())
def _forward(
    ids: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word: Tensor,
    position: Tensor,
    kinds: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    site: int,
    eps: float,
    pad: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, H], mean [T], 1 / deviation [T]. A seed of None means no dropout."""
    rows, width = ids.shape[0], word.shape[1]
    if not use_triton(word):
        z = _summed(ids, positions, types, word, position, kinds)
        mean = z.mean(-1)
        z = z - mean[:, None]
        rstd = (z.square().mean(-1) + eps).rsqrt()
        y = z * rstd[:, None] * weight
        y = y if bias is None else y + bias
        if seed is not None:
            y = y * _keep(ids, width, seed, p, site) * scale_of(p)
        return y.to(dtype), mean, rstd
    y = word.new_empty(rows, width, dtype=dtype)
    mean = word.new_empty(rows, dtype=_wide(word.dtype))
    rstd = torch.empty_like(mean)
    if rows:
        block = block_of(width)
        tile = max(1, min(4, TILE // block)) * MORE_ROWS
        _forward_kernel[(cdiv(rows, tile),)](
            ids, positions, types, word, position, kinds, weight, bias, seed, y, mean, rstd, rows, eps, scale_of(p),
            threshold_of(p), site, H=width, BLOCK=block, ROWS=tile, HAS_TYPES=types is not None,
            HAS_BIAS=bias is not None, DROP=seed is not None, ACC=accumulate(word.dtype),
            num_warps=min(16, max(1, tile * block // 1024)),
        )  # fmt: skip
    return y, mean, rstd


@_forward.register_fake
def _(
    ids: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word: Tensor,
    position: Tensor,
    kinds: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    site: int,
    eps: float,
    pad: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = word.new_empty(ids.shape[0], dtype=_wide(word.dtype))
    return word.new_empty(ids.shape[0], word.shape[1], dtype=dtype), mean, torch.empty_like(mean)


@torch.library.custom_op("regraft::embedding_backward", mutates_args=())
def _backward(
    dy: Tensor,
    ids: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word: Tensor,
    position: Tensor,
    kinds: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    p: float,
    site: int,
    pad: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of word, position, types (empty without), weight and bias, in fp32 (fp64 for fp64)."""
    rows, width = ids.shape[0], word.shape[1]
    wide = _wide(word.dtype)
    dword, dposition = (torch.zeros(table.shape, dtype=wide, device=word.device) for table in (word, position))
    if not use_triton(word):
        g = dy.to(wide)
        if seed is not None:
            g = g * _keep(ids, width, seed, p, site) * scale_of(p)
        xhat = (_summed(ids, positions, types, word, position, kinds) - mean[:, None]) * rstd[:, None]
        wg = g * weight
        dz = wg - xhat * (xhat * wg).mean(-1, keepdim=True) - wg.mean(-1, keepdim=True)
        dz = dz * rstd[:, None]
        dword.index_add_(0, ids, dz * (ids != pad)[:, None])
        dposition.index_add_(0, positions, dz)
        sums = torch.stack([(g * xhat).sum(0), g.sum(0)])
    else:
        block = block_of(width)
        tile = max(1, TILE // block) * MORE_ROWS
        programs = min(max(1, cdiv(rows, tile)), 2 * processors(word.device))
        dz = torch.empty(rows, width, dtype=wide, device=word.device)
        partial = torch.empty(2, programs, width, dtype=wide, device=word.device)
        _backward_kernel[(programs,)](
            dy, ids, positions, types, word, position, kinds, weight, mean, rstd, seed, dz, partial, rows, scale_of(p),
            threshold_of(p), site, H=width, BLOCK=block, ROWS=tile, HAS_TYPES=types is not None,
            DROP=seed is not None, ACC=accumulate(word.dtype), num_warps=min(16, max(2, tile * block // 512)),
        )  # fmt: skip
        sums = partial.sum(1)
        for index, grad, skip in ((ids, dword, pad), (positions, dposition, -1)):
            _sum_runs(index, dz, grad, skip)
    if types is None or kinds is None:
        dkinds = dz.new_empty(0)
    else:
        dkinds = (types[None] == torch.arange(kinds.shape[0], device=types.device)[:, None]).to(wide) @ dz
    return dword, dposition, dkinds, sums[0].clone(), sums[1].clone()


def _sum_runs(index: Tensor, dz: Tensor, grad: Tensor, skip: int) -> None:
    # Shapes do not depend on how many indices are equal: the whole can be captured in a graph.
    rows, width = dz.shape
    if not rows:
        return
    ordered, order = torch.sort(index, stable=True)
    ends = torch.searchsorted(ordered, ordered, right=True)
    block = min(256, next_power_of_2(width))
    _runs_kernel[(rows, cdiv(width, block))](
        ordered, order, ends, dz, grad, skip, H=width, BLOCK=block, RUN=RUN, ACC=accumulate(dz.dtype), num_warps=4
    )


@_backward.register_fake
def _(
    dy: Tensor,
    ids: Tensor,
    positions: Tensor,
    types: Tensor | None,
    word: Tensor,
    position: Tensor,
    kinds: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    p: float,
    site: int,
    pad: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = lambda *shape: word.new_empty(shape, dtype=_wide(word.dtype))  # noqa: E731
    dkinds = like(0) if kinds is None else like(*kinds.shape)
    return like(*word.shape), like(*position.shape), dkinds, like(word.shape[1]), like(word.shape[1])


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, seed, ctx.p, ctx.site, _, ctx.pad, _ = inputs
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(*tensors, *output[1:], seed)


def _gradients(ctx: Any, dy: Tensor, *_: Any) -> tuple:
    ids, positions, types, word, position, kinds, weight, bias, mean, rstd, seed = ctx.saved_tensors
    found = _backward(
        dy.contiguous(),
        ids,
        positions,
        types,
        word,
        position,
        kinds,
        weight,
        mean,
        rstd,
        seed,
        ctx.p,
        ctx.site,
        ctx.pad,
    )
    given = (word, position, kinds, weight, bias)
    grads = [None if x is None else g.to(x.dtype) for g, x in zip(found, given, strict=True)]
    return (None, None, None, *grads, *(None,) * 6)


_forward.register_autograd(_gradients, setup_context=_setup)


@jit
def _gather(table_ptr, index, column, inside, H: tl.constexpr, ACC: tl.constexpr):
    return load_as(table_ptr + index[:, None] * H + column[None, :], inside, ACC)


@jit
def _forward_kernel(
    ids_ptr, positions_ptr, types_ptr, word_ptr, position_ptr, kinds_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr,
    mean_ptr, rstd_ptr, rows, eps, scale, threshold, site, H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_TYPES: tl.constexpr, HAS_BIAS: tl.constexpr, DROP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    here = column < H
    inside = (row < rows)[:, None] & here[None, :]
    z = _gather(word_ptr, tl.load(ids_ptr + row, mask=row < rows, other=0), column, inside, H, ACC)
    z += _gather(position_ptr, tl.load(positions_ptr + row, mask=row < rows, other=0), column, inside, H, ACC)
    if HAS_TYPES:
        z += _gather(kinds_ptr, tl.load(types_ptr + row, mask=row < rows, other=0), column, inside, H, ACC)
    mean = tl.sum(z, 1) / H
    centred = tl.where(inside, z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / H + eps)
    y = centred * rstd[:, None] * load_as(weight_ptr + column, here, ACC)[None, :]
    if HAS_BIAS:
        y += load_as(bias_ptr + column, here, ACC)[None, :]
    if DROP:
        group = tl.arange(0, BLOCK // 8)
        keep = keep_tile(tl.load(seed_ptr), group[None, :], row[:, None], 0, site, threshold, ROWS, BLOCK)
        y = tl.where(keep, y * scale, 0.0)
    store(y_ptr + row.to(tl.int64)[:, None] * H + column[None, :], y, inside)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@jit
def _backward_kernel(
    dy_ptr, ids_ptr, positions_ptr, types_ptr, word_ptr, position_ptr, kinds_ptr, weight_ptr, mean_ptr, rstd_ptr,
    seed_ptr, dz_ptr, partial_ptr, rows, scale, threshold, site, H: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, HAS_TYPES: tl.constexpr, DROP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    here = column < H
    weight = load_as(weight_ptr + column, here, ACC)[None, :]
    dweight = tl.zeros([ROWS, BLOCK], dtype=ACC)
    dbias = tl.zeros([ROWS, BLOCK], dtype=ACC)
    for first in range(program * ROWS, rows, programs * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & here[None, :]
        at = row.to(tl.int64)[:, None] * H + column[None, :]
        dy = load_as(dy_ptr + at, inside, ACC)
        if DROP:
            group = tl.arange(0, BLOCK // 8)
            keep = keep_tile(tl.load(seed_ptr), group[None, :], row[:, None], 0, site, threshold, ROWS, BLOCK)
            dy = tl.where(keep, dy * scale, 0.0)
        z = _gather(word_ptr, tl.load(ids_ptr + row, mask=row < rows, other=0), column, inside, H, ACC)
        z += _gather(position_ptr, tl.load(positions_ptr + row, mask=row < rows, other=0), column, inside, H, ACC)
        if HAS_TYPES:
            z += _gather(kinds_ptr, tl.load(types_ptr + row, mask=row < rows, other=0), column, inside, H, ACC)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        xhat = tl.where(inside, (z - mean[:, None]) * rstd[:, None], 0.0)
        dweight += dy * xhat
        dbias += dy
        slope = dy * weight
        slope = slope - xhat * (tl.sum(xhat * slope, 1) / H)[:, None] - (tl.sum(slope, 1) / H)[:, None]
        tl.store(dz_ptr + at, slope * rstd[:, None], mask=inside)
    at = partial_ptr + program.to(tl.int64) * H + column
    tl.store(at, tl.sum(dweight, 0), mask=here)
    tl.store(at + programs.to(tl.int64) * H, tl.sum(dbias, 0), mask=here)


@jit
def _runs_kernel(
    ordered_ptr, order_ptr, ends_ptr, dz_ptr, grad_ptr, skip, H: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    # The program of a run's first row sums the run.
    here = tl.program_id(0)
    index = tl.load(ordered_ptr + here)
    before = tl.load(ordered_ptr + here - 1, mask=here > 0, other=-1)
    if (before == index) | (index == skip):
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(ends_ptr + here).to(tl.int32)
    acc = tl.zeros([RUN, BLOCK], dtype=ACC)
    for first in range(here, end, RUN):
        at = first + tl.arange(0, RUN)
        row = tl.load(order_ptr + at, mask=at < end, other=0)
        inside = (at < end)[:, None] & (column < H)[None, :]
        acc += load_as(dz_ptr + row[:, None] * H + column[None, :], inside, ACC)
    tl.store(grad_ptr + index * H + column, tl.sum(acc, 0), mask=column < H)


def shipped() -> list[Shipped]:
    """Tables in fp32, output in bf16, with types and dropout, at the hidden sizes of common encoders."""
    given = dict.fromkeys(
        ("ids_ptr", "positions_ptr", "types_ptr", "seed_ptr", "ordered_ptr", "order_ptr", "ends_ptr"), "*i64"
    )
    given |= {
        f"{name}_ptr": "*fp32"
        for name in ("word", "position", "kinds", "weight", "bias", "mean", "rstd", "dz", "partial", "grad")
    }
    given |= {"y_ptr": "*bf16", "dy_ptr": "*bf16", "rows": "i32", "eps": "fp32", "scale": "fp32", "threshold": "i32"}
    given |= {"site": "i32", "skip": "i32"}
    found = []
    for width in (384, 768, 1024):
        block = block_of(width)
        flags = {"H": width, "BLOCK": block, "HAS_TYPES": True, "DROP": True, "ACC": tl.float32}
        rows = min(4, TILE // block)
        forward = {**flags, "HAS_BIAS": True, "ROWS": rows}
        backward = {**flags, "ROWS": TILE // block}
        warps = max(1, rows * block // 1024)
        found.append(Shipped.of(f"embedding forward {width}", _forward_kernel, given, forward, num_warps=warps))
        found.append(
            Shipped.of(f"embedding backward {width}", _backward_kernel, given, backward, num_warps=TILE // 512)
        )
    runs = {"H": 768, "BLOCK": 256, "RUN": RUN, "ACC": tl.float32}
    return [*found, Shipped.of("embedding runs 768", _runs_kernel, given, runs)]
