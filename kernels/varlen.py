"""Variable-length bidirectional attention over a packed row: no padding, no mask, nothing of size length x length kept.

    out = dropout(softmax(scale * R(q) R(k)^T within the window)) v      for every sequence and head

(Dao et al. 2022, 2023; R: rotary embedding, Su et al. 2021). Shape: qkv [T, 3, H, D], cu_seqlens [B + 1] int32 ->
[T, H, D]. FLOPs: 4 H D sum(len^2) forward, 10 backward (14 done); bytes: 4 T H D values forward, 9 backward, and one
fp32 a row and head. Bound by arithmetic from about length 256 on, by memory and launches below. Dropout is made again
from the seed in the backward; blocks outside the window or the sequence are never visited; the backward has no atomics.

On a GPU one of two implementations runs: the kernels of `varlen_triton`, or torch's own
`aten::_flash_attention_forward`. `hand_over` says which is faster for a shape, by measurement; see `hands_over`.
"""

from __future__ import annotations

import logging
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regraft.kernels.checks import expect, expect_bounds, expect_cu_seqlens, expect_range
from regraft.kernels.choice import choice, use_triton
from regraft.kernels.dropout import BELOW, scale_of
from regraft.kernels.hand_over import faster, key_of
from regraft.kernels.lang import IS_INTERPRETED, accumulate, cdiv
from regraft.kernels.philox import keep_mask, resolve_seed, threshold_of
from regraft.kernels.rotary import rotate
from regraft.kernels.varlen_triton import KERNELS, blocks_for, widths

HEAD_SIZES = (32, 64, 96, 128)  # whose speed is measured
LARGEST_HEAD = 128  # of the Triton kernels; 256 of torch's own
FLASH_DTYPES = (torch.bfloat16, torch.float16)
_log = logging.getLogger("regraft.kernels")


def varlen_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    window: int | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """Attention of every token to the tokens of its own sequence at most `window` positions away.

    Shape: qkv [T, 3, H, D] (a larger D than 128 runs as plain torch), cu_seqlens [B + 1] int32 (equal neighbours: an empty
    sequence; the last must be T, which is not read from the device), cos, sin [T, D // 2] -> [T, H, D].
    `max_seqlen`: no sequence is longer. Differentiable in qkv. Raises ValueError or TypeError, naming the argument.
    """
    expect("qkv", qkv, shape=(None, 3, None, None))
    tokens, _, _, size = qkv.shape
    expect_cu_seqlens("cu_seqlens", cu_seqlens, qkv)
    expect_range("p", p, 0, BELOW)
    if (cos is None) != (sin is None):
        raise ValueError(f"{'sin' if sin is None else 'cos'}: is None, expected both cos and sin or neither")
    if cos is not None and size % 2:
        raise ValueError(f"qkv: head size is {size}, expected an even number where positions are rotary")
    for name, angle in (("cos", cos), ("sin", sin)):
        if angle is not None:
            expect(name, angle, shape=(tokens, size // 2), like=qkv)
    if window is not None and window < 0:
        raise ValueError(f"window: is {window}, expected None or a number of positions from 0")
    if max_seqlen < 1 and tokens:
        raise ValueError(f"max_seqlen: is {max_seqlen}, expected at least 1")
    expect_bounds("cu_seqlens", cu_seqlens, tokens, max_seqlen)
    scale = size**-0.5 if scale is None else scale
    side = -1 if window is None or window >= max_seqlen - 1 else window
    if cos is not None and sin is not None:  # in 16 bits their conversion would cost the kernels registers
        cos, sin = (angle.to(torch.promote_types(qkv.dtype, torch.float32)) for angle in (cos, sin))
    if hands_over(qkv, max_seqlen, p, rotary=cos is not None, window=side >= 0):
        return _flash(qkv, cu_seqlens, max_seqlen, scale, p, side, cos, sin)
    seed = resolve_seed(seed, p, qkv.device)
    return _forward(qkv, cu_seqlens, max_seqlen, scale, side, cos, sin, seed, p, site)[0]


def first_rows_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Attention of the first token of each sequence alone, all that a classification head reads.

    Shape: q [B, H, D], k, v [T, H, D] -> [B, H, D]; no sequence may be empty. What torch's flash attention does not take
    goes through `varlen_attention`, with queries of zero for all other tokens. Raises ValueError or TypeError, naming the
    argument.
    """
    expect("k", k, shape=(None, None, None), contiguous=False)
    expect("v", v, shape=k.shape, dtype=k.dtype, like=k, contiguous=False)
    expect_cu_seqlens("cu_seqlens", cu_seqlens, k)
    expect("q", q, shape=(cu_seqlens.shape[0] - 1, *k.shape[1:]), dtype=k.dtype, like=k, contiguous=False)
    expect_range("p", p, 0, BELOW)
    if max_seqlen < 1 and k.shape[0]:
        raise ValueError(f"max_seqlen: is {max_seqlen}, expected at least 1")
    if hands_over(k[:, None], max_seqlen, p):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        each = torch.arange(cu_seqlens.shape[0], dtype=torch.int32, device=q.device)
        call = torch.ops.aten._flash_attention_forward
        return call(q.contiguous(), k, v, each, cu_seqlens, 1, max_seqlen, p, False, False, scale=scale)[0]
    rows = cu_seqlens[:-1].long()
    queries = torch.zeros_like(k).index_copy(0, rows, q)
    qkv = torch.stack((queries, k, v), dim=1)
    out = varlen_attention(qkv, cu_seqlens, max_seqlen, scale=scale, p=p, seed=seed, site=site)
    return out.index_select(0, rows)


def hands_over(qkv: Tensor, max_seqlen: int, p: float, *, rotary: bool = False, window: bool = False) -> bool:
    """Whether torch's flash attention takes this call: fp16 or bf16 on a GPU, and faster by the measured table.

    Where the table has no entry: yes, it is known to be good, and takes head sizes up to 256 that are multiples of 8.
    REGRAFT_KERNELS=triton keeps the call here. Its dropout comes from torch's generator, not from the seed.
    """
    size = qkv.shape[-1]
    if qkv.device.type != "cuda" or qkv.dtype not in FLASH_DTYPES or choice() != "auto" or size > 256 or size % 8:
        return False
    major, minor = torch.cuda.get_device_capability(qkv.device)
    key = key_of(size, max_seqlen, dropout=p > 0, rotary=rotary, window=window)
    return (major, minor) >= (8, 0) and faster(10 * major + minor, key) == "aten"


def _in_triton(qkv: Tensor) -> bool:
    size = qkv.shape[-1]
    if not use_triton(qkv):
        return False
    if size > LARGEST_HEAD and not IS_INTERPRETED:
        if choice() == "triton":
            raise ValueError(f"qkv: head size is {size}, expected at most {LARGEST_HEAD} where Triton is forced")
        _say_too_large(size)
        return False
    return True


@lru_cache
def _say_too_large(size: int) -> None:
    _log.warning("attention runs as plain torch: its head size is %d, Triton's takes at most %d", size, LARGEST_HEAD)


def _flash(qkv: Tensor, cu: Tensor, longest: int, scale: float, p: float, side: int, cos: Any, sin: Any) -> Tensor:
    q, k, v = qkv.unbind(1)
    if cos is not None:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    call = torch.ops.aten._flash_attention_forward
    found = call(
        q, k, v, cu, cu, longest, longest, p, False, False, scale=scale, window_size_left=side, window_size_right=side
    )
    return found[0]


def reference(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int = 0,
    *,
    scale: float | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    window: int | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, sequence by sequence, every step in qkv's dtype."""
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = qkv.unbind(1)
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    seed = seed if threshold_of(p) else None
    out = torch.zeros_like(q)
    for start, end in _spans(cu_seqlens):
        weights = torch.softmax(_scores(q[start:end], k[start:end], scale, -1 if window is None else window), dim=-1)
        if seed is not None:
            weights = weights * _keep(weights, start, seed, p, site) * scale_of(p)
        out = torch.cat([out[:start], torch.einsum("hij,jhd->ihd", weights, v[start:end]), out[end:]])
    return out


def _spans(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    ends = cu_seqlens.tolist()
    return [(a, b) for a, b in zip(ends, ends[1:], strict=False) if b > a]


def _scores(q: Tensor, k: Tensor, scale: float, side: int) -> Tensor:
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    if side >= 0:
        at = torch.arange(len(q), device=q.device)
        scores = scores.masked_fill((at[:, None] - at[None, :]).abs() > side, -math.inf)
    return scores


def _keep(like: Tensor, start: int, seed: Tensor, p: float, site: int) -> Tensor:
    heads, rows, columns = like.shape
    tokens = torch.arange(start, start + rows, device=like.device).expand(heads, rows)
    lane = torch.arange(heads, device=like.device)[:, None]
    return keep_mask(seed, tokens, columns, p, site=site, lane=lane)


def _wide(qkv: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, ...]:
    q, k, v = qkv.unbind(1)
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return q.to(wide), k.to(wide), v.to(wide)


@torch.library.custom_op("regraft::varlen_forward", mutates_args=())
def _forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    side: int,
    cos: Tensor | None,
    sin: Tensor | None,
    seed: Tensor | None,
    p: float,
    site: int,
) -> tuple[Tensor, Tensor]:
    """out [T, H, D]; lse [H, T], log2 of the sum of exp(score). `side` -1: no window; a seed of None: no dropout."""
    tokens, _, heads, size = qkv.shape
    out = qkv.new_empty(tokens, heads, size)
    lse = qkv.new_empty(heads, tokens, dtype=torch.float64 if qkv.dtype == torch.float64 else torch.float32)
    if _in_triton(qkv):
        shared = (qkv, cu_seqlens, cos, sin, seed)
        _launch("forward", (*shared, out, lse), shared, max_seqlen, scale, side, p, site)
        return out, lse
    q, k, v = _wide(qkv, cos, sin)
    for start, end in _spans(cu_seqlens):
        scores = _scores(q[start:end], k[start:end], scale, side)
        weights = torch.softmax(scores, dim=-1)
        lse[:, start:end] = torch.logsumexp(scores, dim=-1) / math.log(2)
        if seed is not None:
            weights = weights * _keep(weights, start, seed, p, site) * scale_of(p)
        out[start:end] = torch.einsum("hij,jhd->ihd", weights, v[start:end]).to(out.dtype)
    return out, lse


@_forward.register_fake
def _(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    side: int,
    cos: Tensor | None,
    sin: Tensor | None,
    seed: Tensor | None,
    p: float,
    site: int,
) -> tuple[Tensor, Tensor]:
    tokens, _, heads, size = qkv.shape
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return qkv.new_empty(tokens, heads, size), qkv.new_empty(heads, tokens, dtype=wide)


@torch.library.custom_op("regraft::varlen_backward", mutates_args=())
def _backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    side: int,
    cos: Tensor | None,
    sin: Tensor | None,
    seed: Tensor | None,
    p: float,
    site: int,
) -> Tensor:
    """Gradient of qkv [T, 3, H, D]."""
    dqkv = torch.empty_like(qkv)
    if _in_triton(qkv):
        delta = torch.empty_like(lse)
        shared = (qkv, cu_seqlens, cos, sin, seed)
        rest = (shared, max_seqlen, scale, side, p, site)
        _launch("queries", (dout, out, *shared, lse, delta, dqkv), *rest)
        _launch("keys", (dout, *shared, lse, delta, dqkv), *rest)
        return dqkv
    q, k, v = _wide(qkv, cos, sin)
    for start, end in _spans(cu_seqlens):
        here = slice(start, end)
        g = dout[here].to(v.dtype)
        weights = torch.softmax(_scores(q[here], k[here], scale, side), dim=-1)
        factor = _keep(weights, start, seed, p, site) * scale_of(p) if seed is not None else 1.0
        slope = torch.einsum("ihd,jhd->hij", g, v[here]) * factor
        slope = weights * (slope - (slope * weights).sum(-1, keepdim=True)) * scale
        dq, dk = torch.einsum("hij,jhd->ihd", slope, k[here]), torch.einsum("hij,ihd->jhd", slope, q[here])
        if cos is not None and sin is not None:  # the transpose of a rotation turns back
            dq, dk = rotate(dq, cos[here], -sin[here]), rotate(dk, cos[here], -sin[here])
        dv = torch.einsum("hij,ihd->jhd", weights * factor, g)
        dqkv[here] = torch.stack([dq, dk, dv], dim=1).to(qkv.dtype)
    return dqkv


@_backward.register_fake
def _(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    side: int,
    cos: Tensor | None,
    sin: Tensor | None,
    seed: Tensor | None,
    p: float,
    site: int,
) -> Tensor:
    return torch.empty_like(qkv)


def _launch(
    part: str, pointers: tuple, shared: tuple, longest: int, scale: float, side: int, p: float, site: int
) -> None:
    qkv, cu_seqlens, cos, _, seed = shared
    tokens, _, heads, size = qkv.shape
    sequences = cu_seqlens.shape[0] - 1
    if not tokens or not sequences:
        return
    target = 90
    if qkv.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(qkv.device)
        target = 10 * major + minor
    b = blocks_for(size, longest, qkv.element_size(), part, target, seed is not None, cos is not None)
    blocks = cdiv(longest, b.n if part == "keys" else b.m)
    width, half = widths(size, cos is not None)
    factor = scale * math.log2(math.e)
    factors = (factor,) if part == "forward" else (factor, scale)
    KERNELS[part][(blocks * heads * sequences,)](
        *pointers, blocks, tokens, side, *factors, scale_of(p), threshold_of(p), site, H=heads, D=size, WIDTH=width,
        PART=half, M=b.m, N=b.n, WINDOW=side >= 0, DROP=seed is not None, ROTARY=cos is not None,
        ACC=accumulate(qkv.dtype), num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, cu_seqlens, ctx.longest, ctx.scale, ctx.side, cos, sin, seed, ctx.p, ctx.site = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, qkv, cu_seqlens, cos, sin, seed)


def _gradients(ctx: Any, dout: Tensor, _: Any) -> tuple:
    out, lse, qkv, cu, cos, sin, seed = ctx.saved_tensors
    rest = (ctx.longest, ctx.scale, ctx.side, cos, sin, seed, ctx.p, ctx.site)
    return _backward(dout.contiguous(), out, lse, qkv, cu, *rest), *(None,) * 9


_forward.register_autograd(_gradients, setup_context=_setup)
