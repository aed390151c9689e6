"""The recurrences of a linear-chain CRF in plain torch, all sequences of a batch together, in fp64.

A step is a product of probabilities with exp(A): one small matrix product, where the textbook's log-sum-exp takes C^2
exponentials a sequence. What it loses to underflow is noticed by its result, and that step is then made in logarithms,
so a mask of -inf or -1e4 on transitions is as exact as it would be there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.kernels.time_major import TimeMajor, time_major

# Terms below the smallest double (5e-324) are lost; beside a sum this large they are below its last bit.
_TINY = 1e-290
_ROWS_AT_ONCE = 1024


def _order(cu_seqlens: Tensor, rows: int) -> TimeMajor:
    return time_major(cu_seqlens.cpu().numpy(), rows)


def _put(indices: object, like: Tensor) -> Tensor:
    return torch.as_tensor(indices, device=like.device)


class _Chain:
    """log sum_i exp(v[n, i] + A[i, j]) for many v and one A."""

    def __init__(self, a: Tensor) -> None:
        self.a = a
        self.shift = a.max().clamp_min(-1e300)
        self.exp = (a - self.shift).exp_()

    def step(self, v: Tensor) -> Tensor:
        top = v.amax(1, keepdim=True).clamp_min_(-1e300)
        sums = (v - top).exp_() @ self.exp
        if float(sums.amin()) < _TINY:
            return torch.logsumexp(v[:, :, None] + self.a, dim=1)
        return sums.log_().add_(top).add_(self.shift)


def _prepared(emissions: Tensor, a: Tensor, start: Tensor, end: Tensor, rows: Tensor) -> list[Tensor]:
    return [emissions.double().index_select(0, rows), *(x.double() for x in (a, start, end))]


def scores(
    emissions: Tensor, tags: Tensor | None, cu_seqlens: Tensor, transitions: Tensor, start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log Z [B], the score of `tags` [B] (0 without), and alpha [T, C] less its largest of each row; all fp64."""
    order = _order(cu_seqlens, emissions.shape[0])
    log_z = emissions.new_zeros(cu_seqlens.shape[0] - 1, dtype=torch.float64)
    gold = torch.zeros_like(log_z)
    e, a, first, last = _prepared(emissions, transitions, start, end, _put(order.rows, emissions))
    alpha = torch.empty_like(e)
    if not e.shape[0]:
        return log_z, gold, alpha
    chain = _Chain(a)
    torch.add(e[: order.sizes[0]], first, out=alpha[: order.sizes[0]])
    for t in range(1, len(order.sizes)):
        size, here, before = (int(x) for x in (order.sizes[t], order.offsets[t], order.offsets[t - 1]))
        step = chain.step(alpha[before : before + size])
        torch.add(step, e[here : here + size], out=alpha[here : here + size])
    log_z[_put(order.sequences, e)] = torch.logsumexp(alpha[_put(order.last, e)] + last, dim=1)
    if tags is not None:
        gold = _gold(e, tags.index_select(0, _put(order.rows, e)), order, a, first, last, gold)
    relative = alpha - alpha.amax(1, keepdim=True).clamp_min_(-1e300)
    return log_z, gold, relative.index_select(0, _put(order.place, e))


def _gold(e: Tensor, tag: Tensor, order: TimeMajor, a: Tensor, first: Tensor, last: Tensor, gold: Tensor) -> Tensor:
    value = e.gather(1, tag[:, None])[:, 0]
    n = len(order.sequences)
    value[:n] += first[tag[:n]]
    before, after = (_put(x, e) for x in order.successors)
    value[after] += a[tag[before], tag[after]]
    ends = _put(order.last, e)
    value[ends] += last[tag[ends]]
    packed = value.index_select(0, _put(order.place, e))
    sequences = _put(order.sequences, e)
    lengths = torch.zeros_like(gold, dtype=torch.int64).index_copy_(0, sequences, _put(order.lengths, e))
    return torch.segment_reduce(packed, "sum", lengths=lengths, initial=0.0)


def gradients(
    grad_log_z: Tensor,
    grad_gold: Tensor,
    alpha: Tensor,
    emissions: Tensor,
    tags: Tensor | None,
    cu_seqlens: Tensor,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to emissions, transitions, start and end by forward-backward; fp64."""
    order = _order(cu_seqlens, emissions.shape[0])
    rows = _put(order.rows, emissions)
    e, a, _, last = _prepared(emissions, transitions, start, end, rows)
    d_a = torch.zeros_like(a)
    if not e.shape[0]:
        return torch.zeros_like(e), d_a, torch.zeros_like(last), torch.zeros_like(last)
    back = _Chain(a.t().contiguous())
    beta = last.expand_as(e).clone()
    for t in range(len(order.sizes) - 2, -1, -1):
        size, here, onward = (int(x) for x in (order.sizes[t + 1], order.offsets[t], order.offsets[t + 1]))
        beta[here : here + size] = back.step(e[onward : onward + size] + beta[onward : onward + size])
    # a row whose sequence has no path at all has no marginals either: nan becomes 0
    p = torch.softmax(alpha.double().index_select(0, rows) + beta, dim=1).nan_to_num_(0.0)

    owner = _put(order.sequences, e)[_owner(order, e)]
    g = grad_log_z.double()[owner]
    d_e = p * g[:, None]
    before, after = (_put(x, e) for x in order.successors)
    _add_edges(d_a, p[before], (e + beta)[after], g[after], a, back)
    ends, n = _put(order.last, e), len(order.sequences)
    d_start, d_end = d_e[:n].sum(0), d_e[ends].sum(0)
    if tags is not None:
        tag, g = tags.index_select(0, rows), grad_gold.double()[owner]
        d_e.scatter_add_(1, tag[:, None], g[:, None])
        d_a.index_put_((tag[before], tag[after]), g[after], accumulate=True)
        d_start.index_put_((tag[:n],), g[:n], accumulate=True)
        d_end.index_put_((tag[ends],), g[ends], accumulate=True)
    return d_e.index_select(0, _put(order.place, e)), d_a, d_start, d_end


def _owner(order: TimeMajor, like: Tensor) -> Tensor:
    # rank of the sequence of each time-major row
    within = torch.arange(len(order.rows), device=like.device)
    return within - torch.repeat_interleave(_put(order.offsets[:-1], like), _put(order.sizes, like))


def _add_edges(d_a: Tensor, p: Tensor, x: Tensor, g: Tensor, a: Tensor, back: _Chain) -> None:
    # P(i -> j) = p_i exp(A_ij + x_j) / sum_j' exp(A_ij' + x_j'), summed over the pairs by one matrix product
    if not p.shape[0]:
        return
    x = x - x.amax(1, keepdim=True).clamp_min_(-1e300)
    likely = x.exp()
    sums = likely @ back.exp
    live = p > 0
    hard = ((sums < _TINY) & live).any(1)
    weight = torch.where(live, p / sums, 0.0) * g[:, None]
    if bool(hard.any()):
        weight[hard] = 0.0
        for part in hard.nonzero()[:, 0].split(_ROWS_AT_ONCE):
            onward = torch.softmax(a + x[part][:, None, :], dim=2).nan_to_num_(0.0)
            d_a += torch.einsum("n,ni,nij->ij", g[part], p[part], onward)
    d_a += (weight.t() @ likely) * back.exp.t()
