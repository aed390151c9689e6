"""The kernels in C: against fp64 as plain torch is, their dropout, their bits, and machines that cannot compile them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from checking import Measured, attention_by_sequence, hold_over_draws, hold_to_twice_the_error, poisoned
from regraft.kernels import attention_native, native, norm_native
from regraft.kernels.attention import plan_layout
from regraft.kernels.choice import forced

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler, or torch without GNU OpenMP")

each_type = pytest.mark.parametrize("dtype", native.TYPES, ids=["fp32", "bf16"])
LENGTHS = [[1], [5, 5, 5], [97, 1, 13, 13, 40], [3, 1025, 2]]


def flags_of_the_processor() -> str:
    about = Path("/proc/cpuinfo")
    return about.read_text(encoding="utf-8", errors="replace") if about.is_file() else ""


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def fresh(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("size", [16, 32, 64, 96])
@pytest.mark.parametrize("window", [None, 0, 4, 64])
@each_type
def test_attention_is_as_near_to_fp64_as_plain_torch(lengths, size, window, dtype):
    cu, scale = starts(lengths), size**-0.5

    def ours(qkv: Tensor) -> Tensor:
        return attention_native.merged_attention(qkv, cu, max(lengths), scale=scale, dropout_p=0.0, window=window)

    def plain(qkv: Tensor) -> Tensor:
        return attention_by_sequence(*qkv.unbind(1), lengths, scale, window)

    hold_to_twice_the_error(ours, plain, [fresh(sum(lengths), 3, 2, size)], dtype, form="auto", names=["qkv"])


@pytest.mark.parametrize("lengths", [*LENGTHS, [7, 8, 9, 15, 16, 17, 31, 32, 33]])
@pytest.mark.parametrize("size", [16, 32, 48, 64])
@pytest.mark.parametrize("window", [None, 0, 4, 64])
@each_type
def test_where_no_backward_follows_it_is_as_near_to_fp64_as_plain_torch(lengths, size, window, dtype):
    cu, scale = starts(lengths), size**-0.5

    def measure() -> list[Measured]:
        qkv = fresh(sum(lengths), 3, 2, size).to(dtype)
        plain = lambda x: attention_by_sequence(*x.unbind(1), lengths, scale, window)  # noqa: E731
        with poisoned():
            out = attention_native.merged_attention(qkv, cu, max(lengths), scale=scale, dropout_p=0.0, window=window)
        return [Measured.of("out", plain(qkv.double()), plain(qkv), out)]

    hold_over_draws(measure)


@pytest.mark.parametrize("lengths", [[1, 4, 33], [7, 7]])
@each_type
def test_one_query_a_sequence_is_as_near_to_fp64_as_plain_torch(lengths, dtype):
    layout = plan_layout(lengths, starts(lengths))
    rows = (fresh(len(lengths), 3, 32), fresh(sum(lengths), 3, 32), fresh(sum(lengths), 3, 32))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert attention_native.runs_here(32, q.detach(), k.detach(), v.detach())
        return layout.attend_first(q, k, v, scale=0.2, dropout_p=0.0)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(q, k.split(lengths), v.split(lengths), strict=True)
        return torch.stack([attention_by_sequence(a[None], b, c, [1], 0.2, keys=[len(b)])[0] for a, b, c in parts])

    hold_to_twice_the_error(ours, plain, rows, dtype, form="auto", names="qkv")


def attended(qkv: Tensor, lengths: list[int], p: float, seed: int) -> Tensor:
    torch.manual_seed(seed)
    cu = starts(lengths)
    return attention_native.merged_attention(qkv, cu, max(lengths), scale=0.1, dropout_p=p, window=None)


@each_type
def test_attention_drops_alike_in_both_directions_and_anew_with_another_seed(dtype):
    length, p = 160, 0.3
    qkv = torch.randn(length, 3, 2, length).to(dtype)
    qkv[:, 2] = torch.eye(length)[:, None]  # the output is what is left of the probabilities
    qkv.requires_grad_()
    out = attended(qkv, [length], p, seed=5)
    kept = out.detach() != 0
    assert abs(float(kept.float().mean()) - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
    out.sum().backward()
    # d sum(out) / d v_j: the sum over queries of what was kept of p_ij
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (2**-7, 2**-7)  # of sums around 1
    torch.testing.assert_close(qkv.grad[:, 2, :, 0], out.detach().sum(0).T, rtol=rtol, atol=atol)
    assert torch.equal(attended(qkv, [length], p, seed=5), out)
    assert not torch.equal(attended(qkv, [length], p, seed=6) != 0, kept)


@each_type
def test_decisions_of_attention_do_not_depend_on_their_neighbours(dtype):
    length, p = 256, 0.5
    qkv = torch.zeros(length, 3, 2, length, dtype=dtype)
    qkv[:, 2] = torch.eye(length)[:, None]
    out = attended(qkv, [length], p, seed=int(torch.seed() % 2**31))
    here, other_head = ((out != 0).float() - 0.5).unbind(1)
    for other in (other_head, *(here.roll(lag, 1) for lag in (1, 2, 8, 16)), here.roll(1, 0)):
        assert abs(float((here * other).mean())) < 6 * 0.25 / length


def test_dropout_keeps_the_mean_of_attention():
    qkv = torch.zeros(1000, 3, 4, 16)
    qkv[:, 2] = 1.0
    out = attended(qkv, [400, 600], 0.25, seed=int(torch.seed() % 2**31))
    assert abs(float(out[..., 0].mean()) - 1.0) < 6 * (0.25 / 0.75 / 500 / out[..., 0].numel()) ** 0.5


@each_type
def test_the_same_bits_whatever_the_number_of_threads_where_no_backward_follows(dtype):
    qkv = torch.randn(300, 3, 4, 32, dtype=dtype)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(attended(qkv, [90, 10, 200], 0.0, seed=3))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(found[0][90:100], attended(qkv[90:100], [10], 0.0, seed=3))  # whatever stands around it


@each_type
def test_the_same_bits_whatever_the_number_of_threads(dtype):
    qkv = torch.randn(300, 3, 4, 32, dtype=dtype, requires_grad=True)
    weight = torch.randn(300, 4, 32, dtype=dtype)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = attended(qkv, [90, 10, 200], 0.1, seed=3)
            found.append((out, *torch.autograd.grad(out, qkv, weight)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("shape", [(1, 16), (1025, 384), (3, 5, 1008)])
@pytest.mark.parametrize("has_bias", [True, False])
@each_type
def test_norm_is_as_near_to_fp64_as_plain_torch(shape, has_bias, dtype):
    inputs = [fresh(*shape), fresh(*shape), fresh(shape[-1]), *([fresh(shape[-1])] if has_bias else [])]

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return norm_native.dropout_add_layer_norm(x, residual, weight, bias, eps=1e-12, p=0.0)

    def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.layer_norm(x + residual, shape[-1:], weight, bias, 1e-12)

    hold_to_twice_the_error(ours, plain, inputs, dtype, form="auto")


@pytest.mark.parametrize("halves", [(True, False), (False, True)], ids=["x", "residual"])
def test_norm_of_bf16_and_fp32_together_is_in_fp32(halves):
    # what autocast hands over: the output of a product in bf16, the sum that runs through the layers in fp32
    x, residual = (torch.randn(37, 64).bfloat16() if half else torch.randn(37, 64) for half in halves)
    weight, bias, slope = torch.randn(64), torch.randn(64), torch.randn(37, 64)
    tensors = [t.requires_grad_() for t in (x, residual, weight, bias)]
    out = norm_native.dropout_add_layer_norm(*tensors, eps=1e-12, p=0.0)
    found = (out, *torch.autograd.grad(out, tensors, slope))
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted = nn.functional.layer_norm(exact[0] + exact[1], (64,), exact[2], exact[3], 1e-12)
    wanted = (wanted, *torch.autograd.grad(wanted, exact, slope.double()))
    assert [t.dtype for t in found] == [torch.float32, *(t.dtype for t in tensors)]
    for mine, theirs in zip(found, wanted, strict=True):
        rounding = 2**-8 if mine.dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(mine.double(), theirs, rtol=rounding, atol=20 * 2e-6)


@each_type
def test_frozen_norms_hand_down_the_same_gradients(dtype):
    x, residual = (torch.randn(301, 96).to(dtype).requires_grad_() for _ in range(2))
    found = []
    for frozen in (False, True):
        weight, bias = (torch.linspace(0.5, 2.0, 96).requires_grad_(not frozen) for _ in range(2))
        torch.manual_seed(1)
        y = norm_native.dropout_add_layer_norm(x, residual, weight, bias, eps=1e-5, p=0.1)
        wanted = (x, residual) if frozen else (x, residual, weight, bias)
        with poisoned():
            found.append(torch.autograd.grad(y, wanted, torch.ones_like(y)))
    assert len(found[0]) == 4
    for one, other in zip(found[0], found[1], strict=False):
        torch.testing.assert_close(one, other)


def test_bf16_keeps_what_is_not_a_number_and_rounds_ties_to_even():
    # without residual's part and with a weight of 1, y is the row itself, shifted: all that is left is the way into bf16
    ties = torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, -1.0 - 2**-8, 2.0**-20] * 4)
    x, zero = torch.zeros(2, 16, dtype=torch.bfloat16), torch.zeros(2, 16, dtype=torch.bfloat16)
    x[1, 3] = float("nan")
    out = norm_native.dropout_add_layer_norm(x, zero, torch.zeros(16), ties, eps=1e-5, p=0.0)
    assert torch.equal(out[0], ties.bfloat16()) and torch.isnan(out[1]).all()


def test_norm_drops_alike_in_both_directions():
    x, residual = (torch.randn(500, 64, requires_grad=True) for _ in range(2))
    weight, bias, p = torch.rand(64) + 0.5, torch.randn(64), 0.2
    slope = torch.randn(500, 64)
    torch.manual_seed(9)
    out = norm_native.dropout_add_layer_norm(x, residual, weight, bias, eps=1e-5, p=p)
    dx, dresidual = torch.autograd.grad(out, (x, residual), slope)
    kept = dx != 0
    assert abs(float(kept.float().mean()) - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
    # with the mask that the gradient shows, plain torch gives the same
    factor = 65536 / (65536 - round(p * 65536))
    again = nn.functional.layer_norm(x * kept * factor + residual, (64,), weight, bias, 1e-5)
    wanted = torch.autograd.grad(again, (x, residual), slope)
    torch.testing.assert_close(out, again, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((dx, dresidual), wanted, rtol=1e-4, atol=1e-5)


@each_type
@pytest.mark.parametrize("size", [16, 32])
def test_a_loss_that_is_not_finite_stays_visible(dtype, size):
    qkv = torch.randn(6, 3, 2, size, dtype=dtype)
    qkv[2, 0, 1, 3] = float("nan")
    alone = attended(qkv, [4, 2], 0.0, seed=0)
    qkv.requires_grad_()
    out = attended(qkv, [4, 2], 0.0, seed=0)
    for found in (alone, out):
        assert torch.isnan(found[2, 1]).all()
        assert torch.isfinite(found[:, 0]).all() and torch.isfinite(found[4:]).all()
    (gradient,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert torch.isnan(gradient[2, 0, 1]).all() and torch.isfinite(gradient[:, :, 0]).all()


@each_type
@pytest.mark.parametrize("window", [None, 2])
def test_a_query_without_keys_gets_nothing_and_gives_nothing(dtype, window):
    q, k, v = (torch.randn(n, 2, 32, dtype=dtype, requires_grad=True) for n in (3, 5, 5))
    cu = torch.tensor([0, 1, 2, 3], dtype=torch.int32), torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    for _ in range(3):  # memory that was worked in before
        out = attention_native.separate_attention(q, k, v, *cu, 3, scale=0.2, dropout_p=0.0, window=window)
        gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        assert not out[1].any() and not gradients[0][1].any()
        assert out[::2].all() and all(g.isfinite().all() for g in gradients)
        with torch.no_grad():
            alone = attention_native.separate_attention(
                *(x.detach() for x in (q, k, v)), *cu, 3, scale=0.2, dropout_p=0.0, window=window
            )
        assert not alone[1].any() and alone[::2].all()


def test_plain_torch_can_be_forced():
    x = torch.randn(4, 32)
    assert native.takes(x)
    with forced("reference"):
        assert not native.takes(x)
    assert not native.takes(x.double()) and not native.takes(x.half())


@pytest.mark.parametrize(
    "compiler, said", [("no-such-compiler", "no C compiler"), ("false", "fused CPU kernels run as plain torch")]
)
def test_without_a_compiler_that_works_it_is_plain_torch_and_the_log_says_why(compiler, said, tmp_path):
    code = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from regraft.kernels import native
from regraft.kernels.attention import packed_attention, plan_layout
layout = plan_layout([3, 2], torch.tensor([0, 3, 5], dtype=torch.int32))
out = packed_attention(torch.ones(5, 3, 1, 16), layout, scale=1.0)
assert native.library() is None and torch.equal(out, torch.ones(5, 1, 16))
"""
    environment = os.environ | {"CC": compiler, "REGRAFT_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(said) == 1


@pytest.mark.skipif("avx512f" not in flags_of_the_processor(), reason="vectors are no longer than that here")
def test_shorter_vectors_are_as_near_to_fp64(tmp_path):
    """The same tests on what is compiled for a processor of vectors half as long."""
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/bash\nexec cc "${@/-march=native/-march=x86-64-v3}"\n')
    compiler.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"CC": str(compiler), "REGRAFT_CACHE": str(tmp_path)}
    chosen = "(attention or norm or query) and not 96 and not 48"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert list(tmp_path.glob("native/*.so"))
