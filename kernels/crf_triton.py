"""The recurrences of a linear-chain CRF in Triton: one program a sequence, the transitions in its registers.

Every step is a log-sum-exp over C x C values, whose largest is taken out, so a mask of -inf or -1e4 is exact. alpha and
beta are kept less their largest value of each row, so that their rounding does not grow with the length; what was taken
out adds up to log Z in fp64. The gradients of the transitions are summed by each program over its sequence, then over
sequences: no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.kernels.lang import accumulate, jit, load_as, next_power_of_2, store, tl
from regraft.kernels.shipped import Shipped

LARGEST = 64  # tags whose square fits a program's registers


def scores(
    emissions: Tensor, tags: Tensor | None, cu_seqlens: Tensor, transitions: Tensor, start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's, in fp32 (fp64 for fp64)."""
    count, states = cu_seqlens.shape[0] - 1, emissions.shape[1]
    wide = torch.float64 if emissions.dtype == torch.float64 else torch.float32
    log_z = torch.empty(count, dtype=wide, device=emissions.device)
    gold = torch.empty_like(log_z)
    alpha = torch.empty_like(emissions, dtype=wide)
    if count:
        block = _block(states)
        _forward_kernel[(count,)](
            emissions, tags, cu_seqlens, transitions, start, end, log_z, gold, alpha, states,
            HAS_TAGS=tags is not None, BLOCK=block, ACC=accumulate(emissions.dtype), num_warps=_warps(block),
        )  # fmt: skip
    return log_z, gold, alpha


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
    """As the reference's."""
    count, states = cu_seqlens.shape[0] - 1, emissions.shape[1]
    d_e = torch.empty_like(emissions)
    edges = torch.empty(count, states + 2, states, dtype=alpha.dtype, device=alpha.device)
    if count:
        block = _block(states)
        _backward_kernel[(count,)](
            grad_log_z, grad_gold, alpha, emissions, tags, cu_seqlens, transitions, end, d_e, edges, states,
            HAS_TAGS=tags is not None, BLOCK=block, ACC=accumulate(emissions.dtype), num_warps=_warps(block),
        )  # fmt: skip
    total = edges.sum(0)
    # each of its own memory: results of an operator may not share it
    return d_e, total[:states].clone(), total[states].clone(), total[states + 1].clone()


def viterbi(
    emissions: Tensor, cu_seqlens: Tensor, transitions: Tensor, start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """Best tags [T] int64 and their scores [B]."""
    count, (rows, states) = cu_seqlens.shape[0] - 1, emissions.shape
    wide = torch.float64 if emissions.dtype == torch.float64 else torch.float32
    path = torch.empty(rows, dtype=torch.int64, device=emissions.device)
    best = torch.empty(count, dtype=wide, device=emissions.device)
    back = torch.empty(rows, states, dtype=torch.int8, device=emissions.device)
    if count:
        block = _block(states)
        _viterbi_kernel[(count,)](
            emissions, cu_seqlens, transitions, start, end, back, path, best, states, BLOCK=block,
            ACC=accumulate(emissions.dtype), num_warps=_warps(block),
        )  # fmt: skip
    return path, best


def _block(states: int) -> int:
    return max(16, next_power_of_2(states))


def _warps(block: int) -> int:
    return max(1, block * block // 512)


@jit
def _finite(x):
    """x, and 0 for -inf: what may be subtracted from -inf."""
    return tl.where(x > float("-inf"), x, 0.0)


@jit
def _log(x):
    """log x, and -inf for 0 without a warning from the interpreter's numpy."""
    return tl.where(x > 0, tl.log(tl.where(x > 0, x, 1.0)), float("-inf"))


@jit
def _load_row(pointer, tag, states, ACC: tl.constexpr):
    return tl.where(tag < states, load_as(pointer + tag, tag < states, ACC), float("-inf"))


@jit
def _load_transitions(a_ptr, states, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """[from, to], -inf outside."""
    tag = tl.arange(0, BLOCK)
    inside = (tag < states)[:, None] & (tag < states)[None, :]
    return tl.where(inside, load_as(a_ptr + tag[:, None] * states + tag[None, :], inside, ACC), float("-inf"))


@jit
def _forward_kernel(
    e_ptr, tags_ptr, cu_ptr, a_ptr, start_ptr, end_ptr, log_z_ptr, gold_ptr, alpha_ptr, states,
    HAS_TAGS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    low = tl.load(cu_ptr + sequence).to(tl.int64)
    high = tl.load(cu_ptr + sequence + 1).to(tl.int64)
    log_z = tl.zeros([1], dtype=tl.float64)
    gold = tl.zeros([1], dtype=tl.float64)
    if low < high:
        tag = tl.arange(0, BLOCK)
        here = tag < states
        a = _load_transitions(a_ptr, states, BLOCK, ACC)
        alpha = _load_row(start_ptr, tag, states, ACC) + _load_row(e_ptr + low * states, tag, states, ACC)
        top = tl.max(alpha, 0)
        alpha = alpha - _finite(top)
        log_z += _finite(top).to(tl.float64)
        tl.store(alpha_ptr + low * states + tag, alpha, mask=here)
        for t in range(low + 1, high):
            e = _load_row(e_ptr + t * states, tag, states, ACC)
            paths = alpha[:, None] + a
            best = tl.max(paths, 0)
            step = best + _log(tl.sum(tl.exp(paths - _finite(best)[None, :]), 0)) + e
            top = tl.max(step, 0)
            alpha = step - _finite(top)
            log_z += _finite(top).to(tl.float64)
            tl.store(alpha_ptr + t * states + tag, alpha, mask=here)
        final = alpha + _load_row(end_ptr, tag, states, ACC)
        top = tl.max(final, 0)
        log_z += (_finite(top) + _log(tl.sum(tl.exp(final - _finite(top)), 0))).to(tl.float64)
        if HAS_TAGS:
            before = tl.load(tags_ptr + low)
            gold += (tl.load(start_ptr + before).to(ACC) + tl.load(e_ptr + low * states + before).to(ACC)).to(
                tl.float64
            )
            for t in range(low + 1, high):
                chosen = tl.load(tags_ptr + t)
                gold += tl.load(a_ptr + before * states + chosen).to(tl.float64)
                gold += tl.load(e_ptr + t * states + chosen).to(tl.float64)
                before = chosen
            gold += tl.load(end_ptr + before).to(tl.float64)
    one = tl.arange(0, 1)
    tl.store(log_z_ptr + sequence + one, log_z.to(ACC))
    tl.store(gold_ptr + sequence + one, gold.to(ACC))


@jit
def _share(x):
    """exp(x) / sum exp(x), and zeros where all is -inf."""
    value = tl.exp(x - _finite(tl.max(x, 0)))
    total = tl.sum(value, 0)
    return value / tl.where(total > 0, total, 1.0)


@jit
def _backward_kernel(
    grad_log_z_ptr, grad_gold_ptr, alpha_ptr, e_ptr, tags_ptr, cu_ptr, a_ptr, end_ptr, d_e_ptr, edges_ptr, states,
    HAS_TAGS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    low = tl.load(cu_ptr + sequence).to(tl.int64)
    high = tl.load(cu_ptr + sequence + 1).to(tl.int64)
    g = tl.load(grad_log_z_ptr + sequence).to(ACC)
    g_gold = tl.load(grad_gold_ptr + sequence).to(ACC)
    tag = tl.arange(0, BLOCK)
    here = tag < states
    d_a = tl.zeros([BLOCK, BLOCK], dtype=ACC)
    d_start = tl.zeros([BLOCK], dtype=ACC)
    d_end = tl.zeros([BLOCK], dtype=ACC)
    if low < high:
        a = _load_transitions(a_ptr, states, BLOCK, ACC)
        beta = _load_row(end_ptr, tag, states, ACC)
        last = high - 1
        d_end = g * _share(_load_row(alpha_ptr + last * states, tag, states, ACC) + beta)
        after = tl.zeros([1], dtype=tl.int64)
        if HAS_TAGS:
            after = tl.load(tags_ptr + last + tl.arange(0, 1))
            d_end += tl.where(tag == after, g_gold, 0.0)
        store(d_e_ptr + last * states + tag, d_end, here)
        d_start = d_end
        for k in range(1, high - low):
            t = last - k
            x = _load_row(e_ptr + (t + 1) * states, tag, states, ACC) + beta
            x = x - _finite(tl.max(x, 0))
            paths = a + x[None, :]
            best = tl.max(paths, 1)
            value = tl.exp(paths - _finite(best)[:, None])
            total = tl.sum(value, 1)
            beta = best + _log(total)
            p = g * _share(_load_row(alpha_ptr + t * states, tag, states, ACC) + beta)
            d_a += value * (p / tl.where(total > 0, total, 1.0))[:, None]
            if HAS_TAGS:
                chosen = tl.load(tags_ptr + t + tl.arange(0, 1))
                d_a += tl.where((tag == chosen)[:, None] & (tag == after)[None, :], g_gold, 0.0)
                p += tl.where(tag == chosen, g_gold, 0.0)
                after = chosen
            store(d_e_ptr + t * states + tag, p, here)
            d_start = p
    edges_ptr += sequence.to(tl.int64) * (states + 2) * states
    inside = here[:, None] & here[None, :]
    tl.store(edges_ptr + tag[:, None] * states + tag[None, :], d_a, mask=inside)
    tl.store(edges_ptr + states * states + tag, d_start, mask=here)
    tl.store(edges_ptr + (states + 1) * states + tag, d_end, mask=here)


@jit
def _viterbi_kernel(
    e_ptr,
    cu_ptr,
    a_ptr,
    start_ptr,
    end_ptr,
    back_ptr,
    path_ptr,
    score_ptr,
    states,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    sequence = tl.program_id(0)
    low = tl.load(cu_ptr + sequence).to(tl.int64)
    high = tl.load(cu_ptr + sequence + 1).to(tl.int64)
    if low < high:
        tag = tl.arange(0, BLOCK)
        a = _load_transitions(a_ptr, states, BLOCK, ACC)
        best = _load_row(start_ptr, tag, states, ACC) + _load_row(e_ptr + low * states, tag, states, ACC)
        for t in range(low + 1, high):
            e = _load_row(e_ptr + t * states, tag, states, ACC)
            paths = best[:, None] + a
            tl.store(back_ptr + t * states + tag, tl.argmax(paths, 0).to(tl.int8), mask=tag < states)
            best = tl.max(paths, 0) + e
        final = best + _load_row(end_ptr, tag, states, ACC)
        tl.store(score_ptr + sequence, tl.max(final, 0))
        chosen = tl.argmax(final, 0).to(tl.int64)
        tl.store(path_ptr + high - 1, chosen)
        tl.debug_barrier()  # the way back reads what other threads have written
        for k in range(1, high - low):
            chosen = tl.load(back_ptr + (high - k) * states + chosen).to(tl.int64)
            tl.store(path_ptr + high - 1 - k, chosen)
    else:
        tl.store(score_ptr + sequence, 0.0)


def shipped() -> list[Shipped]:
    """9 tags (CoNLL-2003) and the most that are taken, from bf16 emissions."""
    found = []
    parameters = {"a_ptr": "*fp32", "start_ptr": "*fp32", "end_ptr": "*fp32"}
    inputs = {
        "e_ptr": "*bf16",
        "tags_ptr": "*i64",
        "cu_ptr": "*i32",
        **parameters,
        "alpha_ptr": "*fp32",
        "states": "i32",
    }
    outputs = {
        "log_z_ptr": "*fp32", "gold_ptr": "*fp32", "grad_log_z_ptr": "*fp32", "grad_gold_ptr": "*fp32", "d_e_ptr": "*bf16",
        "edges_ptr": "*fp32", "back_ptr": "*i8", "path_ptr": "*i64", "score_ptr": "*fp32",
    }  # fmt: skip
    for states in (9, LARGEST):
        block = _block(states)
        constants = {"BLOCK": block, "ACC": tl.float32}
        tagged = {**constants, "HAS_TAGS": True}
        for name, kernel, given in (
            ("forward", _forward_kernel, tagged),
            ("backward", _backward_kernel, tagged),
            ("viterbi", _viterbi_kernel, constants),
        ):
            # rows are as long as there are tags: nothing is known of their alignment
            found.append(
                Shipped.of(f"crf {name} {states}", kernel, {**inputs, **outputs}, given, num_warps=_warps(block), wide_loads=False)
            )  # fmt: skip
    return found
