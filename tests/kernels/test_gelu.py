"""Bias + GELU and GeGLU against fp64, in plain torch and in Triton."""

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
from regraft.kernels import gelu
from regraft.kernels.choice import forced
from regraft.kernels.gelu import bias_geglu, bias_gelu

gated_or_not = pytest.mark.parametrize("gated", [False, True], ids=["gelu", "geglu"])


def apply(gated: bool):
    return bias_geglu if gated else bias_gelu


@both_forms
@each_dtype
@gated_or_not
@pytest.mark.parametrize("rows, width", [(1, 384), (97, 1000), (5, 768)])
def test_it_is_as_near_to_fp64_as_plain_torch(form, dtype, gated, rows, width):
    hold_to_twice_the_error(
        apply(gated),
        lambda x, bias: gelu.reference(x, bias, gated),
        [fresh(rows, width, scale=2), fresh(width)],
        dtype,
        form=form,
        names=("x", "bias"),
    )


@both_forms
@gated_or_not
def test_without_a_bias(form, gated):
    hold_to_twice_the_error(
        apply(gated), lambda x: gelu.reference(x, None, gated), [fresh(1025, 6)], torch.float32, form=form
    )


@both_forms
@gated_or_not
def test_gradients_are_those_of_finite_differences(form, gated):
    hold_gradients_to_finite_differences(apply(gated), [fresh(3, 4), fresh(4)], form)


@both_forms
@gated_or_not
def test_far_from_zero_it_is_the_identity_or_nothing_and_never_nan(form, gated):
    x = torch.tensor([[-1e4, -40.0, 40.0, 1e4]], device=DEVICE).repeat(1, 2 if gated else 1).requires_grad_()
    with forced(form):
        y = apply(gated)(x)
        y.sum().backward()
    assert not y[0, :2].any()
    assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()


@both_forms
@gated_or_not
def test_no_rows_give_no_rows(form, gated):
    x, bias = fresh(0, 8).requires_grad_(), fresh(8).requires_grad_()
    with forced(form):
        y = apply(gated)(x, bias)
        y.sum().backward()
    assert y.shape == (0, 4 if gated else 8) and x.grad.shape == (0, 8) and not bias.grad.any()


@both_forms
def test_two_runs_give_the_same_bits(form):
    x, bias = fresh(50, 40).float().requires_grad_(), fresh(40).float().requires_grad_()
    same_bits_twice(lambda: torch.autograd.grad(bias_gelu(x, bias).square().sum(), [x, bias]), form)


@gated_or_not
def test_the_operator_is_registered_in_full_and_compiles_into_one_graph(gated):
    x, bias = fresh(3, 8).requires_grad_(), fresh(8).requires_grad_()
    torch.library.opcheck(gelu._forward, (x, bias, gated))
    compiled = torch.compile(apply(gated), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, bias), gelu.reference(x, bias, gated))


def test_what_it_does_not_take_is_refused_by_name():
    with pytest.raises(ValueError, match=r"bias: shape is \[3\], expected \[4\]"):
        bias_gelu(torch.zeros(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="x: last dimension is 5"):
        bias_geglu(torch.zeros(2, 5))
    with pytest.raises(TypeError, match="x: dtype is int64"):
        bias_gelu(torch.zeros(2, 4, dtype=torch.int64))
