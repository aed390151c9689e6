"""Bidirectional attention within each sequence of a packed row: in C on CPU where that can be, or over groups of
sequences of like length.

    out = dropout(softmax(scale * q k^T + mask)) v        for every sequence and head     (Vaswani et al. 2017)

Shape: q, k, v [T, H, D] -> out [T, H, D]. FLOPs: 4 H D sum(len^2). A group of b sequences, the longest of L tokens,
is attended as b x L cells; where all have the same length no cell is padding and no mask is needed. `plan_groups`
weighs the cells that padding would waste against the fixed cost of one more group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft.kernels import attention_native
from regraft.kernels.checks import expect, expect_range
from regraft.kernels.dropout import BELOW, LEVELS, dropout, keep_mask, scale_of
from regraft.kernels.rotary import rotate_merged

# What one more group costs, in attention cells squared (b L^2): measured on two cores as about 0.1 ms.
GROUP_COST = 6000


@dataclass(frozen=True)
class Group:
    """b sequences as b x L cells. Shape: pad_index [b * L] (row of each cell; a padding cell repeats its sequence's
    first row); mask [b, L] float32 is 1 at padding cells, or None where there are none."""

    batch: int
    length: int
    pad_index: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Grouped:
    """All sequences of a batch in groups. `members`: sequence numbers of each group, [b] int64. `cell_of_row`: where each
    row stands among the cells of all groups, [T] int64."""

    groups: tuple[Group, ...]
    members: tuple[Tensor, ...]
    cell_of_row: Tensor


@dataclass
class Layout:
    """How the sequences of one packed batch are attended; made once a batch, used by every layer. `lengths`: tokens of
    each sequence; `cu_seqlens`: [B + 1] int32, where each begins and the last ends."""

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    group_cost: int = GROUP_COST
    windows: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @cached_property
    def grouped(self) -> Grouped:
        """The groups, planned when they are first asked for."""
        return plan_cells(self.lengths, self.cu_seqlens.device, self.group_cost)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)

    @cached_property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)

    @cached_property
    def one_each(self) -> Tensor:
        """[B + 1] int32: where each sequence begins that has one row."""
        return torch.arange(len(self.lengths) + 1, dtype=torch.int32, device=self.cu_seqlens.device)

    @property
    def starts(self) -> Tensor:
        """Row of each sequence's first token, [B] int64."""
        return self.cu_seqlens[:-1].long()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float, window: int | None) -> Tensor:
        """Attention within each sequence, [T, H, D] each. Raises ValueError or TypeError, naming the argument."""
        _expect_separate(q, k, v, self, self.tokens)
        _expect_options(dropout_p, window)
        if attention_native.runs_here(q.shape[-1], q, k, v):
            cu = self.cu_seqlens
            return attention_native.separate_attention(
                q, k, v, cu, cu, self.longest, scale=scale, dropout_p=dropout_p, window=window
            )
        return packed_attention(torch.stack((q, k, v), dim=1), self, scale=scale, dropout_p=dropout_p, window=window)

    def attend_merged(self, qkv: Tensor, *, scale: float, dropout_p: float) -> Tensor:
        """The same from one tensor [T, 3, H, D], as a merged projection gives it."""
        return packed_attention(qkv, self, scale=scale, dropout_p=dropout_p)

    def attend_rotary(
        self, qkv: Tensor, angles: tuple[Tensor, Tensor], *, scale: float, dropout_p: float, window: int | None
    ) -> Tensor:
        """Attention from one tensor [T, 3, H, D], with rotary positions of queries and keys. angles: cos, sin [1, T, D], of
        which the second half repeats the first."""
        cos, sin = (x[0, :, : x.shape[-1] // 2] for x in angles)
        return packed_attention(rotate_merged(qkv, cos, sin), self, scale=scale, dropout_p=dropout_p, window=window)

    def attend_first(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float) -> Tensor:
        """Attention of one query a sequence: q [B, H, D], k, v [T, H, D] -> [B, H, D]."""
        return first_row_attention(q, k, v, self, scale=scale, dropout_p=dropout_p)

    def attend_after(self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention that also looks at `keys` and `values` [P, H, D], which all sequences share. Options: `scale`,
        `dropout_p`, and `first` for one query a sequence."""
        from regraft.kernels.prefix_attention import prefixed_attention

        return prefixed_attention(keys, values, q, k, v, self, **options)

    def means(self, hidden: Tensor) -> Tensor:
        """Mean of each sequence's rows: [T, H] -> [B, H]."""
        lengths = torch.as_tensor(self.lengths, device=hidden.device)
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths)
        sums = hidden.new_zeros(len(lengths), hidden.shape[-1]).index_add(0, owner, hidden)
        return sums / lengths[:, None].to(hidden.dtype)

    def window_mask(self, length: int, window: int, like: Tensor) -> Tensor:
        """Additive mask [L, L], very low where |i - j| > window; made once."""
        key = (length, window)
        if key not in self.windows:
            at = torch.arange(length, device=like.device)
            far = (at[:, None] - at[None, :]).abs() > window
            self.windows[key] = torch.zeros(length, length, device=like.device).masked_fill_(far, 1.0)
        return self.windows[key].to(like.dtype) * _low(like.dtype)


def plan_groups(lengths: Sequence[int], group_cost: int = GROUP_COST) -> list[list[int]]:
    """Sequence numbers of each group, shortest first, so that total cost sum(b L^2) + groups * group_cost is least.

    Exact, by dynamic programming over the distinct lengths.
    """
    order = np.argsort(np.asarray(lengths), kind="stable")
    sizes, counts = np.unique(np.asarray(lengths), return_counts=True)
    ends = np.concatenate([[0], np.cumsum(counts)])
    best = np.zeros(len(sizes) + 1)
    cut = np.zeros(len(sizes) + 1, dtype=np.int64)
    for j in range(1, len(sizes) + 1):
        cost = best[:j] + (ends[j] - ends[:j]) * float(sizes[j - 1]) ** 2 + group_cost
        cut[j] = int(cost.argmin())
        best[j] = cost[cut[j]]
    groups: list[list[int]] = []
    j = len(sizes)
    while j:
        groups.append([int(i) for i in order[ends[cut[j]] : ends[j]]])
        j = int(cut[j])
    return groups[::-1]


def plan_layout(lengths: Sequence[int], cu_seqlens: Tensor, group_cost: int = GROUP_COST) -> Layout:
    """Layout of a packed batch with sequences of `lengths` tokens, its tensors on the device of `cu_seqlens`.

    Raises ValueError or TypeError, naming the argument.
    """
    expect("cu_seqlens", cu_seqlens, shape=(len(lengths) + 1,), dtype=torch.int32)
    if min(lengths, default=0) < 0:
        raise ValueError(f"lengths: holds {min(lengths)}, expected no number below 0")
    return Layout(tuple(int(n) for n in lengths), cu_seqlens, group_cost)


def plan_cells(lengths: Sequence[int], device: torch.device, group_cost: int = GROUP_COST) -> Grouped:
    """The groups of sequences of `lengths` tokens, the tensors on `device`."""
    sizes = np.asarray(lengths, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    put = lambda a: torch.from_numpy(np.ascontiguousarray(a)).to(device)  # noqa: E731
    groups, sequences, before = [], [], 0
    cell_of_row = np.empty(int(sizes.sum()), dtype=np.int64)
    for members in plan_groups(lengths, group_cost):
        length = int(sizes[members].max())
        cells = np.arange(length)
        inside = cells[None, :] < sizes[members][:, None]
        index = np.where(inside, starts[members][:, None] + cells[None, :], starts[members][:, None]).reshape(-1)
        real = np.flatnonzero(inside)
        cell_of_row[index[real]] = before + real
        before += len(index)
        mask = None if inside.all() else put((~inside).astype(np.float32))
        groups.append(Group(len(members), length, put(index), mask))
        sequences.append(put(np.asarray(members, dtype=np.int64)))
    return Grouped(tuple(groups), tuple(sequences), put(cell_of_row))


def _low(dtype: torch.dtype) -> float:
    # Finite, and finite when added twice: a padding cell whose whole window is padding must not become NaN.
    return torch.finfo(dtype).min / 4


def _cells(x: Tensor, group: Group) -> Tensor:
    # [T, n, H, D] -> [n, b * H, L, D], contiguous
    n, heads, size = x.shape[1:]
    cells = x.index_select(0, group.pad_index).view(group.batch, group.length, n, heads, size)
    return cells.permute(2, 0, 3, 1, 4).reshape(n, group.batch * heads, group.length, size)


def _rows(cells: list[Tensor], grouped: Grouped) -> Tensor:
    # of each group [n, b * H, L, D] -> [T, n, H, D]; padding cells are left out
    flat = []
    for part, group in zip(cells, grouped.groups, strict=True):
        n, _, length, size = part.shape
        split = part.view(n, group.batch, -1, length, size).permute(1, 3, 0, 2, 4)
        flat.append(split.reshape(group.batch * length, n, -1, size))
    return (flat[0] if len(flat) == 1 else torch.cat(flat)).index_select(0, grouped.cell_of_row)


def _scaled_product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    # factor * a b in one pass; the first argument is not read when beta is 0
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=factor)


def _scores(q: Tensor, k: Tensor, layout: Layout, group: Group, scale: float, window: int | None) -> Tensor:
    scores = _scaled_product(q, k.transpose(-1, -2), scale)
    if group.mask is not None:
        low = group.mask.to(scores.dtype) * _low(scores.dtype)
        scores.view(group.batch, -1, *scores.shape[1:]).add_(low[:, None, None, :])
    if window is not None and window < group.length - 1:
        scores += layout.window_mask(group.length, window, scores)
    return scores


class _PackedAttention(torch.autograd.Function):
    """Few and whole passes: on CPU each small operation costs more for waking the threads than for its arithmetic."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layout: Layout, scale: float, p: float, window: int | None) -> Tensor:
        drop = round(p * LEVELS) > 0
        factor = scale_of(p)
        out, saved = [], []
        for group in layout.grouped.groups:
            q, k, v = _cells(qkv, group)
            probabilities = torch.softmax(_scores(q, k, layout, group, scale, window), dim=-1)
            saved.append(probabilities)
            if drop:
                keep = keep_mask(probabilities.shape, p, qkv.device)
                saved.append(keep)
                out.append(_scaled_product(probabilities * keep, v, factor)[None])
            else:
                out.append(torch.bmm(probabilities, v)[None])
        ctx.save_for_backward(qkv, *saved)
        ctx.layout, ctx.scale, ctx.factor, ctx.drop = layout, scale, factor, drop
        return _rows(out, layout.grouped)[:, 0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        qkv, *saved = ctx.saved_tensors
        layout, scale, factor = ctx.layout, ctx.scale, ctx.factor
        gradients = []
        for group in layout.grouped.groups:
            q, k, v = _cells(qkv, group)
            (g,) = _cells(grad[:, None], group)
            if group.mask is not None:  # a padding cell repeats a real row; it must not add to any gradient
                g.view(group.batch, -1, *g.shape[1:]).mul_((1 - group.mask).to(g.dtype)[:, None, :, None])
            probabilities = used = saved.pop(0)
            slope = _scaled_product(g, v.transpose(-1, -2), factor)
            if ctx.drop:
                keep = saved.pop(0)
                used = probabilities * keep
                slope.mul_(keep)
            slope = torch.ops.aten._softmax_backward_data(slope, probabilities, -1, probabilities.dtype)
            cells = q.new_empty(3, *q.shape)
            nothing = q.new_empty(1, 1, 1)
            torch.baddbmm(nothing, slope, k, beta=0, alpha=scale, out=cells[0])
            torch.baddbmm(nothing, slope.transpose(-1, -2), q, beta=0, alpha=scale, out=cells[1])
            torch.baddbmm(nothing, used.transpose(-1, -2), g, beta=0, alpha=factor, out=cells[2])
            gradients.append(cells)
        return _rows(gradients, layout.grouped), None, None, None, None


def packed_attention(
    qkv: Tensor, layout: Layout, *, scale: float, dropout_p: float = 0.0, window: int | None = None
) -> Tensor:
    """Attention of every token to the tokens of its own sequence, within `window` positions on either side.

    Shape: qkv [T, 3, H, D] -> [T, H, D]. Dropout comes from torch's generator of the device. Raises ValueError or TypeError,
    naming the argument.
    """
    expect("qkv", qkv, shape=(layout.tokens, 3, None, None), like=layout.cu_seqlens, contiguous=False)
    _expect_options(dropout_p, window)
    flash = _flash_attention(qkv, layout, scale, dropout_p, window)
    if flash is not None:
        return flash
    if attention_native.runs_here(qkv.shape[-1], qkv):
        return attention_native.merged_attention(
            qkv, layout.cu_seqlens, layout.longest, scale=scale, dropout_p=dropout_p, window=window
        )
    return _PackedAttention.apply(_short(qkv), layout, scale, dropout_p, window)


def _expect_separate(q: Tensor, k: Tensor, v: Tensor, layout: Layout, queries: int) -> None:
    expect("k", k, shape=(layout.tokens, None, None), like=layout.cu_seqlens, contiguous=False)
    expect("v", v, shape=k.shape, dtype=k.dtype, like=k, contiguous=False)
    expect("q", q, shape=(queries, *k.shape[1:]), dtype=k.dtype, like=k, contiguous=False)


def _expect_options(dropout_p: float, window: int | None) -> None:
    expect_range("dropout_p", dropout_p, 0, BELOW)
    if window is not None and window < 0:
        raise ValueError(f"window: is {window}, expected None or a number of positions from 0")


def _short(x: Tensor) -> Tensor:
    # autocast would cast what products read, forward alone: the backward would meet both types
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype == torch.float32:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _flash_attention(qkv: Tensor, layout: Layout, scale: float, p: float, window: int | None) -> Tensor | None:
    takes = qkv.dtype in (torch.float16, torch.bfloat16) and qkv.shape[-1] <= 256 and qkv.shape[-1] % 8 == 0
    if not qkv.is_cuda or not takes:
        return None
    q, k, v = qkv.unbind(1)
    longest = layout.longest
    side = -1 if window is None else window
    return torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        layout.cu_seqlens,
        layout.cu_seqlens,
        longest,
        longest,
        p,
        False,
        False,
        scale=scale,
        window_size_left=side,
        window_size_right=side,
    )[0]


def first_row_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """Attention of one query a sequence, that of its first row: all that a classification head reads.

    Shape: q [B, H, D], k, v [T, H, D] -> [B, H, D]. Raises ValueError or TypeError, naming the argument.
    """
    _expect_separate(q, k, v, layout, len(layout.lengths))
    _expect_options(dropout_p, None)
    if attention_native.runs_here(q.shape[-1], q, k, v):
        return attention_native.separate_attention(
            q, k, v, layout.one_each, layout.cu_seqlens, layout.longest, scale=scale, dropout_p=dropout_p
        )
    q, kv = _short(q), _short(torch.stack((k, v), dim=1))
    heads = q.shape[1]
    out = []
    for group, rows in zip(layout.grouped.groups, layout.grouped.members, strict=True):
        kg, vg = _cells(kv, group)
        queries = q.index_select(0, rows).view(group.batch * heads, 1, -1)
        scores = torch.bmm(queries, kg.transpose(-1, -2)) * scale
        if group.mask is not None:
            low = group.mask.to(scores.dtype) * _low(scores.dtype)
            scores = scores + low.repeat_interleave(heads, dim=0)[:, None]
        used = dropout(torch.softmax(scores, dim=-1), dropout_p)
        out.append(torch.bmm(used, vg).view(group.batch, heads, -1))
    return torch.empty_like(q).index_copy(0, torch.cat(layout.grouped.members), torch.cat(out))
