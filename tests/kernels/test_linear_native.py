"""Linear layers in C: as near to fp64 as torch's own in bf16 and in fp32, the same bits for any company and number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from checking import poisoned
from regraft.kernels import linear_native, lora_native
from regraft.kernels.linear_native import HALF

ROWS = [0, 1, 31, 32, 97, 1025]
SHAPES = [(32, 64), (384, 1152), (1536, 384), (96, 32)]  # inputs and outputs of a layer


@pytest.fixture(params=[HALF, torch.float32], ids=["bf16", "fp32"])
def kind(request, any_vendor):
    if not linear_native.runs_here(torch.zeros(32, 32, dtype=request.param)):
        pytest.skip(f"products in {request.param} are torch's on this processor")
    return request.param


@pytest.fixture
def drawn(kind):
    return lambda *shape: torch.randn(*shape).to(kind)


def error(found: Tensor, wanted: Tensor) -> float:
    assert not found.isnan().any()
    return float((found.double() - wanted).norm() / max(float(wanted.norm()), 1e-30))


def hold(found: Tensor, plain: Tensor, wanted: Tensor) -> None:
    assert found.shape == plain.shape
    assert error(found, wanted) <= 2 * error(plain, wanted) + 1e-7


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("biased", [True, False])
def test_products_are_as_near_to_fp64_as_torchs(drawn, kind, rows, inputs, outputs, biased):
    x, w, dy = drawn(rows, inputs), drawn(outputs, inputs), drawn(rows, outputs)
    b = drawn(outputs) if biased else None
    wide = x.double() @ w.double().T + (b.double() if biased else 0)
    with poisoned():
        y = linear_native.linear(x, w, b)
        same, active = linear_native.linear_gelu(x, w, b)
        none, alone = linear_native.linear_gelu(x, w, b, keep=False)
        dx = linear_native.input_gradient(dy, w)
        dw, db = linear_native.weight_gradients(dy, x, biased)
    assert y.dtype == active.dtype == dx.dtype == kind and dw.dtype == torch.float32
    assert torch.equal(y, same) and none is None and torch.equal(alone, active)
    hold(y, torch.nn.functional.linear(x, w, b), wide)
    hold(active, torch.nn.functional.gelu(y), torch.nn.functional.gelu(y.double()))
    hold(dx, dy @ w, dy.double() @ w.double())
    # sums are kept in fp32: torch's are held to what fp32 gives
    hold(dw, dy.float().T @ x.float(), dy.double().T @ x.double())
    assert (db is not None) == biased
    if db is not None:
        hold(db, dy.float().sum(0), dy.double().sum(0))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 32])
def test_a_low_rank_term_is_added_in_the_same_sums(drawn, kind, rows, inputs, outputs, rank):
    rank *= linear_native.step(torch.zeros(1, dtype=kind))
    x, w, b, dy = drawn(rows, inputs), drawn(outputs, inputs), drawn(outputs), drawn(rows, outputs)
    inner, up, back, down = drawn(rows, rank), drawn(outputs, rank), drawn(rows, rank), drawn(rank, inputs)
    with poisoned():
        y = linear_native.linear(x, w, b, (inner, up))
        same, active = linear_native.linear_gelu(x, w, b, (inner, up))
        dx = linear_native.input_gradient(dy, w, (back, down))
    beside, above = torch.cat([x, inner], 1), torch.cat([w, up], 1)
    assert torch.equal(y, same)
    hold(y, torch.nn.functional.linear(beside, above, b), beside.double() @ above.double().T + b.double())
    hold(active, torch.nn.functional.gelu(y), torch.nn.functional.gelu(y.double()))
    beside, above = torch.cat([dy, back], 1), torch.cat([w, down], 0)
    hold(dx, beside @ above, beside.double() @ above.double())


@pytest.mark.parametrize("rows", [*ROWS, 2500])
@pytest.mark.parametrize("wide", [32, 384, 1152])
@pytest.mark.parametrize("thin", [1, 2, 3, 4, 7])
def test_products_of_a_low_rank_are_as_near_to_fp64_as_torchs(drawn, kind, rows, wide, thin):
    rank = thin * linear_native.step(torch.zeros(1, dtype=kind))
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for _ in range(1 + 64 // max(rows, 1)):  # of a few numbers alone chance would decide
        x, down, up, bias = drawn(rows, wide), drawn(rank, wide), drawn(wide, rank), drawn(rank)
        inner = drawn(rows, rank)
        with poisoned():
            u, v = linear_native.linear(x, down, None), linear_native.input_gradient(x, up)
            raised, active = linear_native.linear_gelu(x, down, bias)
            back = linear_native.linear(inner, up, None)
            d_down, none = linear_native.weight_gradients(inner, x, bias=False)
        assert none is None
        exact = x.double() @ down.double().T
        of = torch.nn.functional
        for name, parts in {
            "u": (u, x @ down.T, exact),
            "v": (v, x @ up, x.double() @ up.double()),
            "raised": (raised, of.linear(x, down, bias), exact + bias.double()),
            "active": (active, of.gelu(raised), of.gelu(raised.double())),
            "back": (back, inner @ up.T, inner.double() @ up.double().T),
            "d_down": (d_down, inner.float().T @ x.float(), inner.double().T @ x.double()),
        }.items():
            found.setdefault(name, []).append(parts)
    for parts in found.values():
        hold(*(torch.stack(each) for each in zip(*parts, strict=True)))


def test_gelus_slope_is_as_near_to_fp64_as_torchs(drawn, kind):
    y, dh = torch.linspace(-12, 12, 32 * 97).to(kind).view(97, 32), drawn(97, 32)
    leaf = y.double().requires_grad_()
    torch.nn.functional.gelu(leaf).backward(dh.double())
    with poisoned():
        found = linear_native.gelu_gradient(dh, y)
    hold(found, torch.ops.aten.gelu_backward(dh, y), leaf.grad)


def test_what_is_not_finite_shows(drawn):
    x, w = drawn(40, 64), drawn(64, 64)
    x[7, 3], x[9, 5] = float("nan"), float("inf")
    y, active = linear_native.linear_gelu(x, w, None)
    assert y[7].isnan().all() and active[7].isnan().all() and not y[9].isfinite().any()
    assert (active[9][y[9] > 0] == torch.inf).all()
    assert y[8].isfinite().all() and y[10:].isfinite().all()
    assert linear_native.weight_gradients(x, x, True)[1][3].isnan()


def test_the_same_bits_for_any_number_of_threads_and_whatever_the_other_rows(drawn):
    x, w, b, dy = drawn(1025, 384), drawn(1536, 384), drawn(1536), drawn(1025, 1536)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, active = linear_native.linear_gelu(x, w, b)
            found.append((y, active, linear_native.input_gradient(dy, w), *linear_native.weight_gradients(dy, x, True)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
    alone = linear_native.linear(x[700:701], w, b)
    assert torch.equal(alone, found[0][0][700:701])


def test_what_does_not_fit_is_refused_by_name(drawn):
    w = drawn(64, 32)
    for call, name in (
        (lambda: linear_native.linear(drawn(3, 64), w, None), "x"),
        (lambda: linear_native.linear(drawn(3, 32), w, drawn(32)), "bias"),
        (lambda: linear_native.linear(torch.randn(3, 32, dtype=torch.float64), w, None), "x"),
        (lambda: linear_native.linear(drawn(3, 32), drawn(36, 32), None), "weight"),
        (lambda: linear_native.linear(drawn(3, 32), w, None, (drawn(4, 32), drawn(64, 32))), "low.0."),
        (lambda: linear_native.linear(drawn(3, 32), w, None, (drawn(3, 12), drawn(64, 12))), "low.0."),
        (lambda: linear_native.linear(drawn(3, 32), w, None, (drawn(3, 32), drawn(32, 32))), "low.1."),
        (lambda: linear_native.input_gradient(drawn(3, 64), w, (drawn(3, 64), drawn(32, 64))), "low.1."),
        (lambda: linear_native.input_gradient(drawn(3, 32), w), "dy"),
        (lambda: linear_native.weight_gradients(drawn(4, 64), drawn(3, 32), True), "x"),
        (lambda: linear_native.gelu_gradient(drawn(4, 64), drawn(3, 64)), "dh"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: (last dimension )?is .*expected"):
            call()


def test_parts_of_lora_that_do_not_fit_are_refused_by_name(drawn):
    w, down, up, x = drawn(64, 32), drawn(8, 32), drawn(64, 8), drawn(5, 32)
    if not lora_native.runs_here(w):
        pytest.skip("products in bf16 are by tiles on this processor")
    u, dy = drawn(5, 8), drawn(5, 64)
    for call, name in (
        (lambda: lora_native.linear(drawn(5, 64), w, None, down, up, gelu=False, keep=True), "x"),
        (lambda: lora_native.linear(x, w, drawn(32), down, up, gelu=False, keep=True), "bias"),
        (lambda: lora_native.linear(x, w, None, drawn(8, 64), up, gelu=True, keep=True), "down"),
        (lambda: lora_native.linear(x, w, None, drawn(12, 32), drawn(64, 12), gelu=True, keep=True), "up"),
        (lambda: lora_native.linear(x, w, None, down, drawn(8, 64).t(), gelu=True, keep=True), "up"),
        (lambda: lora_native.gradients(x, x, w, down, up, u, None, inputs=True, scale=1.0), "dy"),
        (lambda: lora_native.gradients(dy, x, w, down, up, dy, None, inputs=True, scale=1.0), "inner"),
        (lambda: lora_native.gradients(dy, x, w, down, up, u, x, inputs=True, scale=1.0), "out"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: .*expected"):
            call()


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(32, 48, dtype=HALF), torch.zeros(6, 32), torch.zeros(32, 32, dtype=torch.float64)],
    ids=["inputs", "outputs", "fp64"],
)
def test_other_weights_are_left_to_torch(weight):
    assert not linear_native.runs_here(weight)
