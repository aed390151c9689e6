"""Linear layer and cross-entropy together, for the rows that have a target: masked-language-model loss.

    z_i = h_i W^T + b,   loss = sum_i [ lse(z_i) - (1 - s) z_i[t_i] - s mean_v z_i[v] ]            s: label smoothing
    dz_i = softmax(z_i) - (1 - s) onehot(t_i) - s / V,    dh = dz W,   dW = dz^T h,   db = sum_i dz_i

Shape: hidden [T, H], rows [N] (None: all), weight [V, H], bias [V], targets [N] -> loss [], summed. Rows without a target
are never multiplied with W, and logits exist for one chunk of rows at a time: at most CHUNK_VALUES of them, where
[N, V] of a RoBERTa-base batch is gigabytes. The gradients are made chunk by chunk in the forward, while the logits are
there (the idea of Liger, Hsu et al. 2024), so that nothing is computed twice: 2 N V H FLOPs for the logits and as many for
each of dh and dW that is asked for. Softmax and sums in fp32 (fp64 for fp64).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.kernels.checks import expect, expect_range
from regraft.kernels.choice import use_triton
from regraft.kernels.lang import accumulate, cdiv, jit, load_as, store, tl
from regraft.kernels.shipped import Shipped

CHUNK_VALUES = {"cpu": 1 << 23, "cuda": 1 << 27}
BLOCK = 4096
PADDED = 64


def masked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """Summed loss of `targets` at `rows` of hidden; the caller divides by what it counts.

    Shape: hidden [T, H], weight [V, H], bias [V], targets [N] int64, rows [N] int64 -> [] in fp32 (fp64 for fp64).
    Products in hidden's dtype (autocast's, where it is on). Differentiable in hidden, weight and bias. Rows whose target is ignore_index add nothing; no rows give 0. Raises ValueError,
    TypeError or IndexError (a target or row out of range, on CPU), naming the argument.
    """
    expect("hidden", hidden, shape=(None, None), contiguous=False)
    expect("weight", weight, shape=(None, hidden.shape[1]), like=hidden)
    if bias is not None:
        expect("bias", bias, shape=(weight.shape[0],), like=hidden)
    if rows is not None:
        expect("rows", rows, shape=(None,), dtype=torch.int64, like=hidden)
    count = hidden.shape[0] if rows is None else rows.shape[0]
    expect("targets", targets, shape=(count,), dtype=torch.int64, like=hidden)
    expect_range("label_smoothing", label_smoothing, 0, 1)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows: is {chunk_rows}, expected at least 1")
    if hidden.device.type == "cpu" and count and not torch.compiler.is_compiling():
        _check_values(targets, rows, hidden.shape[0], weight.shape[0], ignore_index)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype == torch.float32:
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    chosen = (hidden if rows is None else hidden.index_select(0, rows)).contiguous()
    grad = torch.is_grad_enabled()
    wanted = [grad and x is not None and x.requires_grad for x in (chosen, weight, bias)]
    limit = CHUNK_VALUES.get(hidden.device.type, CHUNK_VALUES["cuda"])
    step = chunk_rows or max(16, limit // max(1, weight.shape[0]))
    return _loss(chosen, weight, bias, targets, ignore_index, label_smoothing, step, *wanted)[0]


def reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The same in plain torch, all logits at once, every step in hidden's dtype."""
    chosen = hidden if rows is None else hidden[rows]
    logits = torch.nn.functional.linear(chosen, weight, bias)
    return torch.nn.functional.cross_entropy(
        logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
    )


def _check_values(targets: Tensor, rows: Tensor | None, tokens: int, vocabulary: int, ignore_index: int) -> None:
    wrong = targets[((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)]
    if len(wrong):
        raise IndexError(f"targets: holds {int(wrong[0])}, expected 0 to {vocabulary - 1} or {ignore_index}")
    if rows is not None:
        low, high = (int(x) for x in rows.aminmax())
        if low < 0 or high >= tokens:
            raise IndexError(f"rows: holds {low if low < 0 else high}, expected 0 to {tokens - 1}")


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("regraft::masked_cross_entropy", mutates_args=())
def _loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    smoothing: float,
    step: int,
    into_hidden: bool,
    into_weight: bool,
    into_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [], and the gradients of hidden, weight, bias (the latter two in fp32); empty where not asked for."""
    triton = use_triton(hidden)
    into_any = into_hidden or into_weight or into_bias
    wide = _wide(hidden)
    if not triton:
        valid = targets != ignore_index
        if not bool(valid.all()):
            return _without_ignored(
                hidden, weight, bias, targets, valid, ignore_index, smoothing, step, into_hidden, into_weight, into_bias
            )
    w = weight.to(hidden.dtype)
    d_hidden = torch.empty_like(hidden) if into_hidden else hidden.new_empty(0)
    d_weight = weight.new_empty(weight.shape if into_weight else (0,), dtype=wide)
    d_bias = weight.new_zeros(weight.shape[0] if into_bias else 0, dtype=wide)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    if into_weight and not rows:
        d_weight.zero_()
    if rows:  # chunks of one size: a small one at the end would cost a whole pass over dW
        step = cdiv(rows, cdiv(rows, step))
    # Rows of logits start at multiples of 128 bytes or more, whatever the vocabulary: loads of 16 bytes need that.
    stride = cdiv(vocabulary, PADDED) * PADDED if triton else vocabulary
    memory = hidden.new_empty(min(step, rows), stride)
    for low in range(0, rows, step):
        part = slice(low, min(low + step, rows))
        h, t = hidden[part], targets[part]
        logits = memory[: len(h), :vocabulary]
        if bias is None:
            torch.mm(h, w.t(), out=logits)
        else:
            torch.addmm(bias.to(h.dtype), h, w.t(), out=logits)
        make = _softmax_triton if triton else _softmax
        losses, slope = make(logits, t, ignore_index, smoothing, into_any)
        total += losses.sum(dtype=torch.float64)
        if into_hidden:
            torch.mm(slope, w, out=d_hidden[part])
        if into_weight:
            _add_product(d_weight, slope, h, first=low == 0)
        if into_bias:
            d_bias += slope.sum(0, dtype=wide)
    return total.to(wide), d_hidden, d_weight, d_bias


def _without_ignored(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, valid: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, part, d_weight, d_bias = _loss(hidden[valid], weight, bias, targets[valid], *rest)
    if rest[3]:
        d_hidden = torch.zeros_like(hidden)
        d_hidden[valid] = part
        part = d_hidden
    return loss, part, d_weight, d_bias


def _add_product(total: Tensor, slope: Tensor, h: Tensor, first: bool) -> None:
    # total (fp32) += slope^T h
    if total.dtype != h.dtype:
        product = torch.mm(slope.t(), h)
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.mm(slope.t(), h, out=total)
    else:
        total.addmm_(slope.t(), h)


def _softmax(logits: Tensor, targets: Tensor, _: int, smoothing: float, slope: bool) -> tuple[Tensor, Tensor]:
    # Two passes over the chunk: log-softmax with each row in cache, and exp into the logits' own memory.
    logs = torch.log_softmax(logits, 1, dtype=_wide(logits))
    at = targets[:, None]
    losses = logs.gather(1, at)[:, 0].neg_()
    if smoothing:
        losses = (1 - smoothing) * losses - smoothing * logs.mean(1)
    if not slope:
        return losses, logits
    if logits.dtype == logs.dtype:
        p = torch.exp(logs, out=logits)
    else:
        p = logs.exp_()
    if smoothing:
        p -= smoothing / p.shape[1]
    p.scatter_add_(1, at, p.new_full(at.shape, smoothing - 1))
    return losses, p.to(logits.dtype)


def _softmax_triton(
    logits: Tensor, targets: Tensor, ignore_index: int, smoothing: float, slope: bool
) -> tuple[Tensor, Tensor]:
    losses = torch.empty(logits.shape[0], dtype=_wide(logits), device=logits.device)
    _softmax_kernel[(logits.shape[0],)](
        logits, targets, losses, logits.shape[1], logits.stride(0), ignore_index, smoothing,
        BLOCK=BLOCK, SMOOTH=smoothing > 0, SLOPE=slope, ACC=accumulate(logits.dtype), num_warps=8,
    )  # fmt: skip
    return losses, logits


@_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    smoothing: float,
    step: int,
    into_hidden: bool,
    into_weight: bool,
    into_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = _wide(hidden)
    return (
        hidden.new_empty((), dtype=wide),
        torch.empty_like(hidden) if into_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape if into_weight else (0,), dtype=wide),
        weight.new_empty(weight.shape[0] if into_bias else 0, dtype=wide),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or autograd fills a zero for each gradient made here, the largest of [V, H]
    ctx.save_for_backward(*output[1:])
    ctx.wanted = inputs[-3:]
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]


def _gradients(ctx: Any, g: Tensor | None, *_: Any) -> tuple:
    if g is None:
        return (None,) * 10
    scaled = [
        (made * g.to(made.dtype)).to(dtype) if wanted else None
        for made, wanted, dtype in zip(ctx.saved_tensors, ctx.wanted, ctx.dtypes, strict=True)
    ]
    return (*scaled, *(None,) * 7)


_loss.register_autograd(_gradients, setup_context=_setup)


@jit
def _softmax_kernel(
    z_ptr, target_ptr, loss_ptr, width, stride, ignore_index, smoothing, BLOCK: tl.constexpr, SMOOTH: tl.constexpr,
    SLOPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Loss of one row, and dz in place of its logits: one pass for maximum and sum together, one for the gradient."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    target = tl.load(target_ptr + row)
    column = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), dtype=ACC)
    total = tl.zeros([BLOCK], dtype=ACC)
    plain = tl.zeros([BLOCK], dtype=ACC)
    for first in range(0, width, BLOCK):
        here = first + column < width
        z = load_as(
            z_ptr + first + column, first + column < stride, ACC
        )  # what lies between width and stride is unused
        z = tl.where(here, z, float("-inf"))
        higher = tl.maximum(top, z)
        finite = tl.where(higher > float("-inf"), higher, 0.0)
        total = total * tl.exp(top - finite) + tl.exp(z - finite)
        top = higher
        if SMOOTH:
            plain += tl.where(here, z, 0.0)
    largest = tl.max(top, 0)
    total_of_row = tl.sum(total * tl.exp(top - largest), 0)
    counted = target != ignore_index
    at = tl.where(counted, target, 0)
    loss = largest + tl.log(total_of_row) - (1.0 - smoothing) * tl.load(z_ptr + at).to(ACC)
    if SMOOTH:
        loss -= smoothing * tl.sum(plain, 0) / width
    tl.store(loss_ptr + row, tl.where(counted, loss, 0.0))
    if SLOPE:
        tl.debug_barrier()  # the target's logit is read before another thread overwrites it
        for first in range(0, width, BLOCK):
            inside = first + column < stride
            z = load_as(z_ptr + first + column, inside, ACC)
            z = tl.where(first + column < width, z, float("-inf"))
            slope = tl.exp(z - largest) / total_of_row - tl.where(first + column == at, 1.0 - smoothing, 0.0)
            if SMOOTH:
                slope -= smoothing / width
            store(z_ptr + first + column, tl.where(counted, slope, 0.0), inside)


def shipped() -> list[Shipped]:
    """Loss and gradient over a vocabulary of any size, in bf16, with and without smoothing."""
    types = {
        "z_ptr": "*bf16", "target_ptr": "*i64", "loss_ptr": "*fp32", "width": "i32", "stride": "i32", "ignore_index": "i64",
        "smoothing": "fp32",
    }  # fmt: skip
    return [
        Shipped.of(
            "cross-entropy smoothed" if smooth else "cross-entropy",
            _softmax_kernel,
            types,
            {"BLOCK": BLOCK, "SMOOTH": smooth, "SLOPE": True, "ACC": tl.float32},
            num_warps=8,
            aligned=("stride",),
        )
        for smooth in (False, True)
    ]
