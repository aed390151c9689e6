"""The CRF against every path counted out, against fp64, and at the edges: masks, impossible and empty sequences."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from checking import DEVICE, Measured, both_forms, each_dtype, fresh, hold_over_draws, poisoned
from regraft.kernels import crf
from regraft.kernels.choice import forced


def packed(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def parameters(rows: int, states: int, scale: float = 1.0) -> list[Tensor]:
    """Emissions, transitions, start, end: random, fp64."""
    return [fresh(rows, states, scale=scale), fresh(states, states), fresh(states), fresh(states)]


def every_path(e: Tensor, a: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Scores of all C^L paths of one sequence."""
    rows, states = e.shape
    paths = list(itertools.product(range(states), repeat=rows))
    scores = [
        start[y[0]]
        + end[y[-1]]
        + sum(e[t, k] for t, k in enumerate(y))
        + sum((a[i, j] for i, j in itertools.pairwise(y)), torch.zeros(()))
        for y in paths
    ]
    return torch.stack(scores), paths


def plain_log_z(e: Tensor, cu: Tensor, a: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The textbook recurrence, a sequence at a time, differentiated by autograd."""
    out = []
    for low, high in itertools.pairwise(cu.tolist()):
        if low == high:
            out.append(e.sum() * 0)
            continue
        alpha = start + e[low]
        for t in range(low + 1, high):
            alpha = torch.logsumexp(alpha[:, None] + a, dim=0) + e[t]
        out.append(torch.logsumexp(alpha + end, dim=0))
    return torch.stack(out)


def plain_gold(e: Tensor, tags: Tensor, cu: Tensor, a: Tensor, start: Tensor, end: Tensor) -> Tensor:
    out = []
    for low, high in itertools.pairwise(cu.tolist()):
        y = tags[low:high]
        if low == high:
            out.append(e.sum() * 0)
            continue
        out.append(start[y[0]] + end[y[-1]] + e[range(low, high), y].sum() + a[y[:-1], y[1:]].sum())
    return torch.stack(out)


@both_forms
@pytest.mark.parametrize("forbidden", [None, float("-inf"), -1e4])
def test_it_agrees_with_every_path_counted_out(form, forbidden):
    lengths, states = [3, 1, 0, 4, 2], 3
    cu = packed(lengths)
    e, a, start, end = parameters(sum(lengths), states)
    if forbidden is not None:
        a[0, 1] = a[2, 2] = start[1] = forbidden
    tags = torch.zeros(sum(lengths), dtype=torch.int64, device=DEVICE)
    with forced(form), poisoned():
        log_z = crf.log_partition(e, cu, a, start, end)
        p = crf.marginals(e, cu, a, start, end)
        likelihood = crf.log_likelihood(e, tags, cu, a, start, end)
        best, best_score = crf.viterbi(e, cu, a, start, end)
    for b, (low, high) in enumerate(itertools.pairwise(cu.tolist())):
        if low == high:
            assert float(log_z[b]) == float(likelihood[b]) == float(best_score[b]) == 0.0
            continue
        scores, paths = every_path(e[low:high], a, start, end)
        wanted = torch.logsumexp(scores, 0)
        torch.testing.assert_close(log_z[b], wanted, atol=1e-9, rtol=1e-9, check_device=False)
        torch.testing.assert_close(likelihood[b], scores[0] - wanted, atol=1e-9, rtol=1e-9, check_device=False)
        chance = torch.softmax(scores, 0)
        for t, k in itertools.product(range(high - low), range(states)):
            share = float(sum(c for c, y in zip(chance, paths, strict=True) if y[t] == k))
            assert float(p[low + t, k]) == pytest.approx(share, abs=1e-9)
        assert tuple(best[low:high].tolist()) == paths[int(scores.argmax())]
        assert float(best_score[b]) == pytest.approx(float(scores.max()), abs=1e-9)


@both_forms
def test_gradients_are_those_of_finite_differences(form):
    cu = packed([2, 1, 0, 3])
    tags = torch.randint(3, (6,), device=DEVICE)
    inputs = [x.requires_grad_() for x in parameters(6, 3)]
    with forced(form), poisoned():
        fast = form == "triton"  # along random directions, where every call is interpreted
        assert torch.autograd.gradcheck(lambda e, *rest: crf.log_likelihood(e, tags, cu, *rest), inputs, fast_mode=fast)
        assert torch.autograd.gradcheck(lambda e, *rest: crf.log_partition(e, cu, *rest), inputs, fast_mode=fast)


@both_forms
@each_dtype
@pytest.mark.parametrize("lengths, states", [([5, 1, 0, 33], 9), ([1], 1), ([11, 7], 23)])
def test_error_is_at_most_twice_that_of_plain_torch_in_the_same_dtype(form, dtype, lengths, states):
    names = ("out", "emissions", "transitions", "start", "end")
    cu = packed(lengths)

    def measure() -> list[Measured]:
        tags = torch.randint(states, (sum(lengths),), device=DEVICE)
        inputs = [x.to(dtype).double() for x in parameters(sum(lengths), states, scale=3.0)]
        weight = fresh(len(lengths))

        def results(of: torch.dtype, ours: bool) -> list[Tensor]:
            leaves = [x.to(of).clone().requires_grad_() for x in inputs]
            e, *rest = leaves
            if ours:
                out = crf.log_likelihood(e, tags, cu, *rest)
            else:
                out = plain_gold(e, tags, cu, *rest) - plain_log_z(e, cu, *rest)
            (out * weight.to(out.dtype)).sum().backward()
            return [out.detach(), *(x.grad for x in leaves)]

        exact, plain = results(torch.float64, False), results(dtype, False)
        with forced(form), poisoned():
            found = results(dtype, True)
        return [Measured.of(*each) for each in zip(names, exact, plain, found, strict=True)]

    hold_over_draws(measure)


@both_forms
def test_rounding_does_not_grow_with_the_length(form):
    # Every position's marginals are a distribution, and a long sequence's are as exact as a short one's.
    cu = packed([97])
    inputs = parameters(97, 5, scale=20.0)
    inputs = [x.float().double() for x in inputs]
    with forced("reference"):
        wanted = crf.marginals(inputs[0], cu, *inputs[1:])
    with forced(form):
        found = crf.marginals(inputs[0].float(), cu, *(x.float() for x in inputs[1:]))
    assert float((found.double() - wanted).abs().max()) < 2e-5
    torch.testing.assert_close(found.sum(1), torch.ones_like(found[:, 0]), rtol=0, atol=1e-6)


@both_forms
def test_far_apart_scores_lose_no_path_to_underflow(form):
    # The only way on is through a state 2000 nats below the best one, as a strong mask or a sure emission makes it.
    e = torch.tensor([[0.0, -2000.0], [0.0, 0.0], [-3000.0, 0.0]], dtype=torch.float64, device=DEVICE)
    a = torch.tensor([[0.0, -1e4], [-1e4, 0.0]], dtype=torch.float64, device=DEVICE)
    rest = (a, torch.zeros(2, dtype=torch.float64, device=DEVICE), torch.zeros(2, dtype=torch.float64, device=DEVICE))
    leaves = [x.clone().requires_grad_() for x in (e, *rest)]
    twins = [x.clone().requires_grad_() for x in (e, *rest)]
    with forced(form):
        found = crf.log_partition(leaves[0], packed([3]), *leaves[1:])
    wanted = plain_log_z(twins[0], packed([3]), *twins[1:])
    found.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(found, wanted)
    for x, y in zip(leaves, twins, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


@both_forms
def test_what_is_forbidden_has_no_gradient_and_a_sequence_without_a_path_says_so(form):
    states, cu = 4, packed([5, 3])
    e, a, start, end = parameters(8, states)
    a[1, 2] = start[3] = float("-inf")
    e[6] = float("-inf")
    leaves = [x.requires_grad_() for x in (e, a, start, end)]
    with forced(form), poisoned():
        log_z = crf.log_partition(e, cu, a, start, end)
        log_z[0].backward()
    assert torch.isfinite(log_z[0])
    assert log_z.tolist()[1] == float("-inf")
    assert float(a.grad[1, 2]) == float(start.grad[3]) == 0.0
    assert all(torch.isfinite(x.grad).all() for x in leaves)
    assert not e.grad[5:].any()


@both_forms
def test_zero_rows_and_zero_sequences_give_zeros(form):
    e, a, start, end = (x.requires_grad_() for x in parameters(0, 3))
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    with forced(form), poisoned():
        out = crf.log_likelihood(e, none, packed([0, 0]), a, start, end)
        out.sum().backward()
        assert crf.log_partition(e, packed([]), a, start, end).shape == (0,)
        path, scores = crf.viterbi(e, packed([0]), a, start, end)
    assert out.tolist() == [0.0, 0.0]
    assert not a.grad.any()
    assert path.shape == (0,)
    assert scores.tolist() == [0.0]


@both_forms
def test_two_runs_give_the_same_bits(form):
    cu, tags = packed([12, 3, 9]), torch.randint(9, (24,), device=DEVICE)
    inputs = [x.float() for x in parameters(24, 9)]

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = crf.log_likelihood(leaves[0], tags, cu, *leaves[1:])
        out.sum().backward()
        return [out, *(x.grad for x in leaves)]

    with forced(form):
        for x, y in zip(run(), run(), strict=True):
            assert torch.equal(x, y)


@both_forms
def test_the_operators_are_registered_whole_and_compile_without_a_break(form):
    cu, tags = packed([3, 2]), torch.randint(4, (5,), device=DEVICE)
    e, a, start, end = (x.float().requires_grad_() for x in parameters(5, 4))
    with forced(form):
        torch.library.opcheck(torch.ops.regraft.crf_scores, (e, tags, cu, a, start, end))
        torch.library.opcheck(torch.ops.regraft.crf_viterbi, (e.detach(), cu, a.detach(), start.detach(), end.detach()))
        compiled = torch.compile(crf.log_likelihood, fullgraph=True, backend="aot_eager")
        found = compiled(e, tags, cu, a, start, end)
        assert torch.equal(found, crf.log_likelihood(e, tags, cu, a, start, end))
        found.sum().backward()
    assert torch.isfinite(e.grad).all()


def test_bad_input_is_refused_by_the_arguments_name():
    cu, tags = packed([3, 2]), torch.zeros(5, dtype=torch.int64, device=DEVICE)
    e, a, start, end = parameters(5, 4)
    with pytest.raises(ValueError, match=r"transitions: shape is \[4, 3\], expected \[4, 4\]"):
        crf.log_likelihood(e, tags, cu, a[:, :3].contiguous(), start, end)
    with pytest.raises(ValueError, match=r"tags: shape is \[4\], expected \[5\]"):
        crf.log_likelihood(e, tags[:4], cu, a, start, end)
    with pytest.raises(TypeError, match="cu_seqlens: dtype is float64"):
        crf.log_partition(e, cu.double(), a, start, end)
    if DEVICE == "cpu":
        with pytest.raises(IndexError, match="tags: holds -100, expected 0 to 3"):
            crf.log_likelihood(e, tags - 100, cu, a, start, end)
        with pytest.raises(ValueError, match="cu_seqlens: is 0 to 4, expected 0 to 5"):
            crf.log_partition(e, packed([2, 2]), a, start, end)
        with pytest.raises(ValueError, match="cu_seqlens: falls after sequence 1"):
            crf.viterbi(e, packed([3, -2, 4]), a, start, end)


def test_the_servers_viterbi_needs_no_torch():
    code = "import sys, regraft.kernels.viterbi; print('torch' in sys.modules, 'triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
