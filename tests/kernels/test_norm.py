"""Dropout + residual + LayerNorm against fp64, in plain torch and in Triton."""

from __future__ import annotations

import pytest
import torch

from checking import (
    DEVICE,
    both_forms,
    each_dtype,
    fresh,
    hold_gradients_to_finite_differences,
    hold_to_twice_the_error,
    same_bits_twice,
)
from regraft.kernels import norm
from regraft.kernels.choice import forced
from regraft.kernels.norm import dropout_add_layer_norm
from regraft.kernels.philox import make_seed

NAMES = ("x", "residual", "weight", "bias")


def inputs(rows: int, width: int) -> list[torch.Tensor]:
    return [fresh(rows, width), fresh(rows, width), fresh(width, scale=0.2) + 1, fresh(width)]


@both_forms
@each_dtype
@pytest.mark.parametrize("rows, width", [(1, 384), (97, 768), (6, 1000), (5, 2)])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_it_is_as_near_to_fp64_as_plain_torch(form, dtype, rows, width, p):
    options = {"p": p, "seed": make_seed(5, DEVICE), "site": 3, "eps": 1e-5}
    hold_to_twice_the_error(
        lambda *t: dropout_add_layer_norm(*t, **options),
        lambda *t: norm.reference(*t, **options),
        inputs(rows, width),
        dtype,
        form=form,
        names=NAMES,
    )


@both_forms
def test_many_rows_are_shared_out_among_programs(form):
    hold_to_twice_the_error(
        lambda *t: dropout_add_layer_norm(*t), lambda *t: norm.reference(*t), inputs(1025, 24), torch.float32, form=form
    )


@both_forms
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_are_those_of_finite_differences(form, p):
    seed = make_seed(1, DEVICE)
    hold_gradients_to_finite_differences(
        lambda *t: dropout_add_layer_norm(*t, p=p, seed=seed, eps=1e-5), inputs(3, 10), form
    )


@both_forms
def test_residual_and_bias_may_be_absent(form):
    x, _, weight, _ = inputs(5, 40)
    with forced(form):
        found = dropout_add_layer_norm(x, None, weight)
    assert torch.allclose(found, torch.nn.functional.layer_norm(x, (40,), weight, None, 1e-12))


@both_forms
def test_no_rows_give_no_rows_and_gradients_of_zero(form):
    leaves = [t.requires_grad_() for t in inputs(0, 16)]
    with forced(form):
        dropout_add_layer_norm(*leaves, p=0.1).sum().backward()
    assert leaves[0].grad.shape == (0, 16)
    assert not leaves[2].grad.any() and not leaves[3].grad.any()


@both_forms
def test_two_runs_give_the_same_bits_and_the_mask_is_the_same_backwards(form):
    leaves = [t.float().requires_grad_() for t in inputs(70, 64)]
    seed = make_seed(9, DEVICE)

    def run():
        for t in leaves:
            t.grad = None
        out = dropout_add_layer_norm(*leaves, p=0.5, seed=seed)
        out.backward(torch.ones_like(out) * torch.arange(64, device=DEVICE))
        return [out.detach(), *(t.grad for t in leaves)]

    same_bits_twice(run, form)
    _, dx, dresidual, *_ = run()
    kept = dx != 0
    assert 0.4 < float(kept.float().mean()) < 0.6
    assert torch.allclose(dx[kept], 2 * dresidual[kept])


def test_plain_torch_and_triton_drop_the_same_values():
    from regraft.kernels.lang import HAS_TRITON

    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    x, residual, weight, bias = (t.float() for t in inputs(9, 100))
    seed = make_seed(4, DEVICE)
    found = []
    for form in ("reference", "triton"):
        with forced(form):
            found.append(dropout_add_layer_norm(x, residual, weight, bias, p=0.3, seed=seed, site=2))
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_the_operator_is_registered_in_full(p):
    x, residual, weight, bias = (t.float().requires_grad_() for t in inputs(4, 16))
    seed = make_seed(1, DEVICE) if p else None
    torch.library.opcheck(norm._forward, (x, residual, weight, bias, seed, p, 1, 1e-5))


def test_it_compiles_into_one_graph():
    x, residual, weight, bias = (t.float().requires_grad_() for t in inputs(4, 16))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def go(x):
        return dropout_add_layer_norm(x * 2, residual, weight, bias)

    go(x).sum().backward()
    assert torch.allclose(go(x), norm.reference(x * 2, residual, weight, bias), atol=1e-5)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"residual": torch.zeros(3, 16)}, "residual: shape"),
        ({"residual": torch.zeros(4, 16).half()}, "residual: dtype is float16, expected float32"),
        ({"weight": torch.zeros(15)}, "weight: shape"),
        ({"bias": torch.zeros(16, 2)[:, 0]}, "bias: strides"),
        ({"p": 1.0}, "p: is 1.0"),
        ({"p": 0.1, "seed": torch.zeros(2, dtype=torch.int64)}, "seed: shape"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name(change, said):
    good = {"x": torch.zeros(4, 16), "residual": torch.zeros(4, 16), "weight": torch.ones(16), "bias": torch.zeros(16)}
    with pytest.raises((ValueError, TypeError), match=said):
        dropout_add_layer_norm(**{**good, **change})
