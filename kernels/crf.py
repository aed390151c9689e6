"""Linear-chain conditional random field over packed rows: log-partition, marginals, gold score, best path.

    score(y) = start[y_0] + sum_t e_t[y_t] + sum_t A[y_{t-1}, y_t] + end[y_last]          (Lafferty et al. 2001)
    log Z    = log sum_y exp score(y)            by alpha_t[j] = log sum_i exp(alpha_{t-1}[i] + A[i, j]) + e_t[j]
    d log Z / d e_t[j] = P(y_t = j),   d log Z / d A[i, j] = sum_t P(y_t = i, y_{t+1} = j)       by forward-backward

Shape: e [T, C] packed, cu_seqlens [B + 1], A [C, C] (from, to), start [C], end [C] -> one number a sequence, [B].
FLOPs: about 4 C^2 a row each way. Bytes moved: emissions once, alpha (fp32) written, and both read again backwards.

-inf and -1e4 in A, start, end or e forbid, exactly: what is forbidden has probability and gradient 0. A sequence
without any path has log Z = -inf and gradient 0. An empty sequence has log Z = score = 0. The results are fp32 (fp64 for
fp64 emissions), since the log-likelihood of a long sequence is in the hundreds. More than 64 tags run as plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.kernels import crf_reference as reference
from regraft.kernels import crf_triton
from regraft.kernels.checks import FLOATS, INTEGERS, expect
from regraft.kernels.choice import use_triton

_OUT = tuple[Tensor, Tensor, Tensor]


def log_likelihood(
    emissions: Tensor, tags: Tensor, cu_seqlens: Tensor, transitions: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    """log P(tags) of each sequence, [B]. Shape: emissions [T, C], tags [T] int64, cu_seqlens [B + 1] int32 or int64,
    transitions [C, C] (from, to), start [C], end [C]. Differentiable in all four.

    Raises ValueError, TypeError (dtype) or IndexError (a tag out of range, on CPU), naming the argument.
    """
    _check(emissions, tags, cu_seqlens, transitions, start, end)
    log_z, gold, _ = torch.ops.regraft.crf_scores(emissions, tags, cu_seqlens, transitions, start, end)
    return gold - log_z


def log_partition(emissions: Tensor, cu_seqlens: Tensor, transitions: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """log Z of each sequence, [B], differentiable in all but cu_seqlens. Shapes and errors as of `log_likelihood`."""
    _check(emissions, None, cu_seqlens, transitions, start, end)
    return torch.ops.regraft.crf_scores(emissions, None, cu_seqlens, transitions, start, end)[0]


def marginals(emissions: Tensor, cu_seqlens: Tensor, transitions: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """P(y_t = j) at every row, [T, C], not differentiable. Shapes and errors as of `log_likelihood`."""
    _check(emissions, None, cu_seqlens, transitions, start, end)
    rest = (cu_seqlens, transitions.detach(), start.detach(), end.detach())
    emissions = emissions.detach()
    log_z, gold, alpha = torch.ops.regraft.crf_scores(emissions, None, *rest)
    once = torch.ones_like(log_z)
    return torch.ops.regraft.crf_gradients(once, torch.zeros_like(gold), alpha, emissions, None, *rest)[0]


def viterbi(
    emissions: Tensor, cu_seqlens: Tensor, transitions: Tensor, start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """Best tags [T] int64 and their scores [B]; ties go to the lower tag. `kernels.viterbi` is the same without torch."""
    _check(emissions, None, cu_seqlens, transitions, start, end)
    path, scores = torch.ops.regraft.crf_viterbi(emissions, cu_seqlens, transitions, start, end)
    return path, scores


def _check(
    emissions: Tensor, tags: Tensor | None, cu_seqlens: Tensor, transitions: Tensor, start: Tensor, end: Tensor
) -> None:
    expect("emissions", emissions, shape=(None, None))
    rows, states = emissions.shape
    if states < 1:
        raise ValueError("emissions: has no tags, expected [rows, tags] with at least one tag")
    expect("cu_seqlens", cu_seqlens, shape=(None,), dtype=INTEGERS, like=emissions)
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens: is empty, expected [sequences + 1]")
    expect("transitions", transitions, shape=(states, states), dtype=FLOATS, like=emissions)
    expect("start", start, shape=(states,), dtype=FLOATS, like=emissions)
    expect("end", end, shape=(states,), dtype=FLOATS, like=emissions)
    if tags is None:
        return
    expect("tags", tags, shape=(rows,), dtype=torch.int64, like=emissions)
    if tags.device.type == "cpu" and rows and not torch.compiler.is_compiling():
        low, high = (int(x) for x in tags.aminmax())
        if low < 0 or high >= states:
            raise IndexError(f"tags: holds {low if low < 0 else high}, expected 0 to {states - 1}")


def _fits(emissions: Tensor) -> bool:
    return emissions.shape[1] <= crf_triton.LARGEST and use_triton(emissions)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("regraft::crf_scores", mutates_args=())
def _scores(
    emissions: Tensor, tags: Tensor | None, cu_seqlens: Tensor, transitions: Tensor, start: Tensor, end: Tensor
) -> _OUT:
    if _fits(emissions):
        return crf_triton.scores(emissions, tags, cu_seqlens, transitions, start, end)
    out = reference.scores(emissions, tags, cu_seqlens, transitions, start, end)
    return tuple(x.to(_wide(emissions)) for x in out)  # type: ignore[return-value]


@_scores.register_fake
def _(
    emissions: Tensor, tags: Tensor | None, cu_seqlens: Tensor, transitions: Tensor, start: Tensor, end: Tensor
) -> _OUT:
    one = emissions.new_empty(cu_seqlens.shape[0] - 1, dtype=_wide(emissions))
    return one, torch.empty_like(one), torch.empty_like(emissions, dtype=_wide(emissions))


@torch.library.custom_op("regraft::crf_gradients", mutates_args=())
def _gradients(
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
    inputs = (emissions, tags, cu_seqlens, transitions, start, end)
    form = crf_triton if _fits(emissions) else reference
    d_e, d_a, d_start, d_end = form.gradients(grad_log_z, grad_gold, alpha, *inputs)
    return d_e.to(emissions.dtype), d_a.to(transitions.dtype), d_start.to(start.dtype), d_end.to(end.dtype)


@_gradients.register_fake
def _(
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
    return torch.empty_like(emissions), torch.empty_like(transitions), torch.empty_like(start), torch.empty_like(end)


def _save(ctx: Any, inputs: tuple, output: _OUT) -> None:
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], *inputs)


def _backward(ctx: Any, grad_log_z: Tensor | None, grad_gold: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    alpha, emissions, tags, cu_seqlens, *rest = ctx.saved_tensors
    nothing = alpha.new_zeros(cu_seqlens.shape[0] - 1)
    g, g_gold = (nothing if x is None else x.contiguous() for x in (grad_log_z, grad_gold))
    d_e, *d_rest = torch.ops.regraft.crf_gradients(g, g_gold, alpha, emissions, tags, cu_seqlens, *rest)
    return d_e, None, None, *d_rest


_scores.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("regraft::crf_viterbi", mutates_args=())
def _viterbi(
    emissions: Tensor, cu_seqlens: Tensor, transitions: Tensor, start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    if _fits(emissions):
        return crf_triton.viterbi(emissions, cu_seqlens, transitions, start, end)
    from regraft.kernels.viterbi import viterbi as decode

    arrays = [x.detach().to(_wide(emissions)).cpu().numpy() for x in (emissions, transitions, start, end)]
    path, scores = decode(arrays[0], cu_seqlens.cpu().numpy(), *arrays[1:])
    return torch.from_numpy(path).to(emissions.device), torch.from_numpy(scores).to(emissions.device)


@_viterbi.register_fake
def _(emissions: Tensor, cu_seqlens: Tensor, transitions: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    path = emissions.new_empty(emissions.shape[0], dtype=torch.int64)
    return path, emissions.new_empty(cu_seqlens.shape[0] - 1, dtype=_wide(emissions))
