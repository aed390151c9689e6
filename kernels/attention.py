"""Bidirectional attention within each sequence of a packed row, over groups of sequences of like length.

    out = dropout(softmax(scale * q k^T + mask)) v        for every sequence and head     (Vaswani et al. 2017)

Shape: q, k, v [T, H, D] -> out [T, H, D]. FLOPs: 4 H D sum(len^2). A group of b sequences, the longest of L tokens,
is attended as b x L cells; where all have the same length no cell is padding and no mask is needed. `plan_groups`
weighs the cells that padding would waste against the fixed cost of one more group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from regraft.kernels.dropout import LEVELS, dropout, keep_mask, scale_of

# What one more group costs, in attention cells squared (b L^2): measured on two cores as about 0.1 ms.
GROUP_COST = 6000


@dataclass(frozen=True)
class Group:
    """b sequences as b x L cells. Shape: pad_index [b * L] (row of each cell; a padding cell repeats its sequence's
    first row), token_index [n] (the cells that are tokens) and rows [n] (their rows), both None when no cell is
    padding; mask [b, 1, 1, L] is 1 at padding cells, or None."""

    batch: int
    length: int
    pad_index: Tensor
    token_index: Tensor | None = None
    rows: Tensor | None = None
    mask: Tensor | None = None


@dataclass
class Layout:
    """How the sequences of one packed batch are attended; made once a batch, used by every layer. `members`: sequence
    numbers of each group, [b] int64."""

    tokens: int
    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    groups: tuple[Group, ...]
    members: tuple[Tensor, ...]
    windows: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def starts(self) -> Tensor:
        """Row of each sequence's first token, [B] int64."""
        return self.cu_seqlens[:-1].long()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float, window: int | None) -> Tensor:
        """Attention within each sequence, [T, H, D] each."""
        return packed_attention(q, k, v, self, scale=scale, dropout_p=dropout_p, window=window)

    def attend_first(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float) -> Tensor:
        """Attention of one query a sequence: q [B, H, D], k, v [T, H, D] -> [B, H, D]."""
        return first_row_attention(q, k, v, self, scale=scale, dropout_p=dropout_p)

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
    """Layout of a packed batch with sequences of `lengths` tokens, its tensors on the device of `cu_seqlens`."""
    sizes = np.asarray(lengths, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    device = cu_seqlens.device
    put = lambda a: torch.from_numpy(np.ascontiguousarray(a)).to(device)  # noqa: E731
    groups, sequences = [], []
    for members in plan_groups(lengths, group_cost):
        sequences.append(put(np.asarray(members, dtype=np.int64)))
        length = int(sizes[members].max())
        cells = np.arange(length)
        inside = cells[None, :] < sizes[members][:, None]
        index = np.where(inside, starts[members][:, None] + cells[None, :], starts[members][:, None])
        if inside.all():
            groups.append(Group(len(members), length, put(index.reshape(-1))))
            continue
        mask = np.where(inside, np.float32(0), np.float32(1))[:, None, None, :]
        flat = inside.reshape(-1)
        groups.append(
            Group(
                len(members),
                length,
                put(index.reshape(-1)),
                put(np.flatnonzero(flat)),
                put(index.reshape(-1)[flat]),
                put(mask),
            )
        )
    return Layout(int(starts[-1]), tuple(int(n) for n in sizes), cu_seqlens, tuple(groups), tuple(sequences))


def _low(dtype: torch.dtype) -> float:
    # Finite, and finite when added twice: a padding cell whose whole window is padding must not become NaN.
    return torch.finfo(dtype).min / 4


def _cells(x: Tensor, group: Group) -> Tensor:
    # [T, H, D] -> [b, H, L, D]
    return x.index_select(0, group.pad_index).view(group.batch, group.length, *x.shape[1:]).transpose(1, 2)


def _put_rows(out: Tensor, cells: Tensor, group: Group) -> None:
    # [b, H, L, D] back to the rows of [T, H, D] it came from; padding cells are left out
    flat = cells.transpose(1, 2).reshape(group.batch * group.length, *out.shape[1:])
    if group.token_index is None:
        out.index_copy_(0, group.pad_index, flat)
    else:
        out.index_copy_(0, group.rows, flat.index_select(0, group.token_index))


def _probabilities(q: Tensor, k: Tensor, layout: Layout, group: Group, scale: float, window: int | None) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)).mul_(scale)
    if group.mask is not None:
        scores += group.mask.to(scores.dtype) * _low(scores.dtype)
    if window is not None and window < group.length - 1:
        scores += layout.window_mask(group.length, window, scores)
    return torch.softmax(scores, dim=-1)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout: Layout, scale: float, p: float, window: int | None) -> Tensor:  # type: ignore[override]
        out = torch.empty_like(v)
        saved: list[Tensor] = []
        drop = round(p * LEVELS) > 0
        for group in layout.groups:
            qg, kg, vg = (_cells(x, group) for x in (q, k, v))
            probabilities = _probabilities(qg, kg, layout, group, scale, window)
            keep = keep_mask(probabilities.shape, p, q.device) if drop else None
            used = (probabilities * keep).mul_(scale_of(p)) if keep is not None else probabilities
            _put_rows(out, torch.matmul(used, vg), group)
            saved += [probabilities] if keep is None else [probabilities, keep]
        ctx.save_for_backward(q, k, v, *saved)
        ctx.layout, ctx.scale, ctx.p, ctx.drop = layout, scale, p, drop
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        q, k, v, *saved = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        each = 2 if ctx.drop else 1
        for i, group in enumerate(ctx.layout.groups):
            probabilities = saved[each * i]
            qg, kg, vg, gg = (_cells(x, group) for x in (q, k, v, grad))
            if group.token_index is not None:
                # A padding cell repeats a real row; it must not add to any gradient.
                real = (group.mask == 0).transpose(-1, -2)
                gg = gg * real
            used = probabilities
            dp = torch.matmul(gg, vg.transpose(-1, -2))
            if ctx.drop:
                keep, factor = saved[each * i + 1], scale_of(ctx.p)
                used = (probabilities * keep).mul_(factor)
                dp = (dp * keep).mul_(factor)
            ds = torch.ops.aten._softmax_backward_data(dp, probabilities, -1, probabilities.dtype).mul_(ctx.scale)
            _put_rows(dv, torch.matmul(used.transpose(-1, -2), gg), group)
            _put_rows(dq, torch.matmul(ds, kg), group)
            _put_rows(dk, torch.matmul(ds.transpose(-1, -2), qg), group)
        return dq, dk, dv, None, None, None, None


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    scale: float,
    dropout_p: float = 0.0,
    window: int | None = None,
) -> Tensor:
    """Attention of every token to the tokens of its own sequence, within `window` positions on either side.

    Shape: q, k, v [T, H, D] -> [T, H, D]. Dropout comes from torch's generator of the device.
    """
    flash = _flash_attention(q, k, v, layout, scale, dropout_p, window)
    if flash is not None:
        return flash
    return _PackedAttention.apply(q, k, v, layout, scale, dropout_p, window)


def _flash_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, p: float, window: int | None
) -> Tensor | None:
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] > 256:
        return None
    longest = max(layout.lengths)
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

    Shape: q [B, H, D], k, v [T, H, D] -> [B, H, D].
    """
    out = []
    members = []
    for group, rows in zip(layout.groups, layout.members, strict=True):
        kg, vg = _cells(k, group), _cells(v, group)
        scores = torch.matmul(q.index_select(0, rows)[:, :, None], kg.transpose(-1, -2)) * scale
        if group.mask is not None:
            scores = scores + group.mask.to(scores.dtype) * _low(scores.dtype)
        used = dropout(torch.softmax(scores, dim=-1), dropout_p)
        out.append(torch.matmul(used, vg)[:, :, 0])
        members.append(rows)
    return torch.empty_like(q).index_copy(0, torch.cat(members), torch.cat(out))
