"""Attention of every token to its own sequence and to keys and values that all sequences share (a trained prefix).

    out = dropout(softmax(scale * q [prefix k; k]^T)) [prefix v; v]     for every sequence and head (Li and Liang 2021)

Shape: q, k, v [T, H, D], prefix keys, values [P, H, D] -> [T, H, D]. The prefix is read by all sequences of a group at
once and takes no rows of its own: linear layers never see it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regraft.kernels.checks import expect, expect_range
from regraft.kernels.dropout import BELOW, dropout

if TYPE_CHECKING:
    from regraft.kernels.attention import Group, Layout


def prefixed_attention(
    keys: Tensor,
    values: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    scale: float,
    dropout_p: float = 0.0,
    first: bool = False,
) -> Tensor:
    """See above; `first`: q has one row a sequence, [B, H, D] -> [B, H, D]. Raises ValueError or TypeError, naming the
    argument."""
    expect("k", k, shape=(layout.tokens, None, None), like=layout.cu_seqlens, contiguous=False)
    expect("v", v, shape=k.shape, dtype=k.dtype, like=k, contiguous=False)
    queries_given = len(layout.lengths) if first else layout.tokens
    expect("q", q, shape=(queries_given, *k.shape[1:]), dtype=k.dtype, like=k, contiguous=False)
    expect("keys", keys, shape=(None, *k.shape[1:]), like=k, contiguous=False)
    expect("values", values, shape=keys.shape, like=k, contiguous=False)
    expect_range("dropout_p", dropout_p, 0, BELOW)
    out, grouped = [], layout.grouped
    for group, members in zip(grouped.groups, grouped.members, strict=True):
        queries = q.index_select(0, members)[:, :, None] if first else _cells(q, group)
        scores = torch.matmul(queries * scale, _after(keys, _cells(k, group)).transpose(-1, -2))
        if group.mask is not None:
            low = group.mask.to(scores.dtype) * (torch.finfo(scores.dtype).min / 4)
            scores = scores + torch.nn.functional.pad(low, (len(keys), 0))[:, None, None]
        used = dropout(torch.softmax(scores, dim=-1), dropout_p)
        out.append(torch.matmul(used, _after(values, _cells(v, group))).transpose(1, 2).flatten(0, 1))
    if first:
        return torch.empty_like(q).index_copy(0, torch.cat(grouped.members), torch.cat(out))
    return torch.cat(out).index_select(0, grouped.cell_of_row)


def _cells(x: Tensor, group: Group) -> Tensor:
    # [T, H, D] -> [b, H, L, D]
    return x.index_select(0, group.pad_index).view(group.batch, group.length, *x.shape[1:]).transpose(1, 2)


def _after(prefix: Tensor, cells: Tensor) -> Tensor:
    # [P, H, D], [b, H, L, D] -> [b, H, P + L, D]
    shared = prefix.to(cells.dtype).transpose(0, 1)[None].expand(cells.shape[0], -1, -1, -1)
    return torch.cat((shared, cells), dim=2)
