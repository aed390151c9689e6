"""The kernels of heads and losses for bench/kernels_gpu.py: pooling, scalar mix, cross-entropy over a vocabulary, CRF."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor


def head_cases(device: str, case: Callable[..., Any], leaf: Callable[..., Tensor]) -> Iterator[Any]:
    """Cases at BERT-base sizes, each made when it is called; on CPU tiny ones."""
    big = device != "cpu"
    for kind in ("mean", "max"):
        yield partial(pool_case, device, case, leaf, *((32, 512, 768) if big else (2, 8, 64)), kind)
    yield partial(mix_case, device, case, leaf, *((13, 16384, 768) if big else (3, 8, 64)))
    for rows in (1229, 2458) if big else (8,):  # 15% of 8k and 16k tokens
        yield partial(cross_entropy_case, device, case, leaf, rows, *((768, 30522) if big else (16, 50)))
    for make in (crf_case, viterbi_case):
        yield partial(make, device, case, leaf, *((512, 32, 9) if big else (3, 4, 5)))


def bounds(count: int, length: int, device: str) -> Tensor:
    return torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=device)


def pool_case(device: str, case: Callable, leaf: Callable, count: int, length: int, width: int, kind: str) -> Any:
    from regraft.kernels.pooling import segment_pool

    cu = bounds(count, length, device)
    owner = torch.arange(count, device=device).repeat_interleave(length)
    ours = lambda x: segment_pool(x, cu, kind, normalise=True)  # noqa: E731

    def eager(x: Tensor) -> Tensor:
        nothing = x.new_zeros(count, width)
        if kind == "mean":
            pooled = nothing.index_add(0, owner, x) / length
        else:
            pooled = nothing.index_reduce(0, owner, x, "amax", include_self=False)
        return torch.nn.functional.normalize(pooled, dim=-1)

    forms = {"regraft": ours, "eager": eager, "compile": eager}
    moved = count * length * width * 2
    shape = f"{count} x {length} x {width}"
    return case(f"{kind} pooling + L2", shape, [leaf(count * length, width, device=device)], forms, moved, moved)


def mix_case(device: str, case: Callable, leaf: Callable, layers: int, tokens: int, width: int) -> Any:
    from regraft.kernels.mix import scalar_mix

    stored = torch.randn(layers, tokens, width, device=device, dtype=torch.bfloat16)
    gamma = torch.ones(1, device=device)
    ours = lambda w: scalar_mix(stored, w, gamma)  # noqa: E731
    eager = lambda w: (torch.softmax(w, 0).to(stored.dtype)[:, None, None] * stored).sum(0)  # noqa: E731
    forms = {"regraft": ours, "eager": eager, "compile": eager}
    moved = (layers + 1) * tokens * width * 2
    inputs = [leaf(layers, device=device, dtype=torch.float32)]
    return case("scalar mix", f"{layers} x {tokens} x {width}", inputs, forms, moved, moved)


def cross_entropy_case(device: str, case: Callable, leaf: Callable, rows: int, width: int, vocabulary: int) -> Any:
    """The forward is measured with the gradients that it makes; the backward then only scales them."""
    from regraft.kernels.cross_entropy import masked_cross_entropy, reference

    targets = torch.randint(vocabulary, (rows,), device=device)

    def ours(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with torch.enable_grad():
            return masked_cross_entropy(h, w, b, targets)

    eager = lambda h, w, b: reference(h, w, b, targets)  # noqa: E731
    forms = {"regraft": ours, "eager": eager, "compile": eager}
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        def liger(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
            with torch.enable_grad():  # it makes its gradients in the forward, too
                found = Liger.apply(h, w, targets, b)
            return found[0] if isinstance(found, tuple) else found

        if device != "cpu":
            forms["liger"] = liger
    except ImportError:
        pass
    inputs = [leaf(rows, width, device=device), leaf(vocabulary, width, device=device), leaf(vocabulary, device=device)]
    work = 2.0 * rows * width * vocabulary
    return case("linear cross-entropy", f"{rows} x {width} x {vocabulary}", inputs, forms, work, 2 * work, "FLOPs")


def crf_case(device: str, case: Callable, leaf: Callable, count: int, length: int, states: int) -> Any:
    from regraft.kernels import crf

    cu, tags = bounds(count, length, device), torch.randint(states, (count * length,), device=device)
    ours = lambda e, a, s, t: crf.log_likelihood(e, tags, cu, a, s, t)  # noqa: E731

    def eager(e: Tensor, a: Tensor, s: Tensor, t: Tensor) -> Tensor:
        by_time, y = e.view(count, length, states), tags.view(count, length)
        alpha = s + by_time[:, 0]
        for k in range(1, length):
            alpha = torch.logsumexp(alpha[:, :, None] + a, 1) + by_time[:, k]
        gold = by_time.gather(2, y[:, :, None]).sum((1, 2)) + s[y[:, 0]] + t[y[:, -1]] + a[y[:, :-1], y[:, 1:]].sum(1)
        return gold - torch.logsumexp(alpha + t, 1)

    inputs, moved = crf_inputs(device, leaf, count, length, states)
    return case(
        "CRF", f"{count} x {length}, {states} tags", inputs, {"regraft": ours, "eager": eager}, 2 * moved, 3 * moved
    )


def crf_inputs(device: str, leaf: Callable, count: int, length: int, states: int) -> tuple[list[Tensor], float]:
    """Emissions, transitions, start and end; the bytes of the emissions."""
    shapes = ((count * length, states), (states, states), (states,), (states,))
    return [leaf(*shape, device=device, dtype=torch.float32) for shape in shapes], 4.0 * count * length * states


def viterbi_case(device: str, case: Callable, leaf: Callable, count: int, length: int, states: int) -> Any:
    """The best tags; there is nothing to differentiate."""
    from regraft.kernels import crf

    cu = bounds(count, length, device)
    ours = lambda e, a, s, t: crf.viterbi(e, cu, a, s, t)[0]  # noqa: E731

    def eager(e: Tensor, a: Tensor, s: Tensor, t: Tensor) -> Tensor:
        by_time = e.view(count, length, states)
        score, came = s + by_time[:, 0], []
        for k in range(1, length):
            best, at = (score[:, :, None] + a).max(1)
            score = best + by_time[:, k]
            came.append(at)
        path = [(score + t).argmax(1)]
        for at in reversed(came):
            path.append(at.gather(1, path[-1][:, None])[:, 0])
        return torch.stack(path[::-1], dim=1).flatten()

    inputs, moved = crf_inputs(device, leaf, count, length, states)
    inputs = [x.detach() for x in inputs]
    forms = {"regraft": ours, "eager": eager}
    return case("Viterbi", f"{count} x {length}, {states} tags", inputs, forms, moved, 0.0)
