"""Scalar mix against fp64, in plain torch and in Triton."""

from __future__ import annotations

import pytest
import torch

from checking import (
    both_forms,
    each_dtype,
    fresh,
    hold_gradients_to_finite_differences,
    hold_to_twice_the_error,
    poisoned,
    same_bits_twice,
)
from regraft.kernels import mix
from regraft.kernels.choice import forced
from regraft.kernels.mix import scalar_mix

each_norm = pytest.mark.parametrize("normalise", [False, True])


def inputs(layers: int, rows: int, width: int) -> list[torch.Tensor]:
    """gamma, weights, then the layers."""
    return [fresh(1), fresh(layers), *(fresh(rows, width) for _ in range(layers))]


@both_forms
@each_dtype
@each_norm
@pytest.mark.parametrize("layers, rows, width", [(7, 97, 384), (1, 1, 1000)])
def test_it_is_as_near_to_fp64_as_plain_torch(form, dtype, normalise, layers, rows, width):
    gamma, weights, *x = inputs(layers, rows, width)
    gamma, weights = (t.to(dtype).double() for t in (gamma, weights))
    hold_to_twice_the_error(
        lambda *x: scalar_mix(x, weights.to(x[0].dtype), gamma.to(x[0].dtype), normalise=normalise, eps=1e-5),
        lambda *x: mix.reference(x, weights.to(x[0].dtype), gamma.to(x[0].dtype), normalise=normalise, eps=1e-5),
        x,
        dtype,
        form=form,
        names=[f"layer {j}" for j in range(layers)],
    )


@both_forms
@each_dtype
@pytest.mark.parametrize("rows, width", [(1025, 100), (1, 1000)])
def test_gradients_of_the_weights_lose_nothing_over_many_rows(form, dtype, rows, width):
    # One number sums over all values: how near plain torch comes is luck, so what the terms allow is granted as well.
    gamma, weights, *x = (t.to(dtype).double() for t in inputs(3, rows, width))
    weights.requires_grad_()
    dy = torch.randn_like(x[0]).to(dtype)
    (wanted,) = torch.autograd.grad(mix.reference(x, weights, gamma), weights, dy.double())
    leaf = weights.detach().to(dtype).requires_grad_()
    with forced(form), poisoned():
        y = scalar_mix([t.to(dtype) for t in x], leaf, gamma.to(dtype))
        (found,) = torch.autograd.grad(y, leaf, dy)
    terms = max(float((dy.double() * t).norm()) for t in x) * float(gamma.abs())
    allowed = torch.finfo(dtype).eps * float(wanted.abs().max()) + 4 * torch.finfo(torch.float32).eps * terms
    assert float((found.double() - wanted).abs().max()) <= allowed


@both_forms
@each_norm
def test_gradients_are_those_of_finite_differences(form, normalise):
    hold_gradients_to_finite_differences(
        lambda gamma, w, *x: scalar_mix(x, w, gamma, normalise=normalise, eps=1e-5), inputs(3, 4, 5), form
    )


@both_forms
def test_layers_are_taken_from_a_store_in_either_order_without_a_gradient(form):
    gamma, w, *layers = (x.float() for x in inputs(4, 9, 24))
    by_layer = torch.stack(layers)
    by_row = torch.stack(layers, dim=1).transpose(0, 1)
    w.requires_grad_()
    wanted = mix.reference(layers, w.detach(), gamma)
    gradients = []
    with forced(form):
        for stored in (by_layer, by_row, layers):
            y = scalar_mix(stored, w, gamma)
            assert torch.allclose(y, wanted, atol=1e-5)
            gradients.append(torch.autograd.grad(y.square().sum(), w)[0])
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@both_forms
def test_no_rows_give_no_rows_and_gradients_of_zero(form):
    gamma, w, *layers = (x.requires_grad_() for x in inputs(2, 0, 8))
    with forced(form), poisoned():
        scalar_mix(layers, w, gamma).sum().backward()
    assert layers[0].grad.shape == (0, 8)
    assert not w.grad.any() and not gamma.grad.any()


@both_forms
def test_two_runs_give_the_same_bits(form):
    leaves = [x.float().requires_grad_() for x in inputs(5, 70, 33)]

    def run() -> list[torch.Tensor]:
        y = scalar_mix(leaves[2:], leaves[1], leaves[0], normalise=True)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    same_bits_twice(run, form)


def test_the_operator_is_registered_in_full_and_compiles_into_one_graph():
    gamma, w, *layers = (x.float().requires_grad_() for x in inputs(3, 6, 8))
    torch.library.opcheck(mix._mix, (layers, w, True, 1e-5))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def go(*x):
        return scalar_mix(x, w, gamma)

    go(*layers).sum().backward()
    assert torch.allclose(go(*layers), mix.reference(layers, w, gamma), atol=1e-5)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"layers": []}, "layers: is empty"),
        ({"layers": [torch.zeros(4, 8), torch.zeros(4, 7)]}, r"layers\[1\]: shape is \[4, 7\], expected \[4, 8\]"),
        ({"weights": torch.zeros(3)}, r"weights: shape is \[3\], expected \[2\]"),
        ({"gamma": torch.zeros(2)}, "gamma: shape"),
        ({"layers": torch.zeros(2, 1, 9000)}, "rows hold 9000 values, expected at most 8192"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name(change, said):
    good = {"layers": torch.zeros(2, 4, 8), "weights": torch.zeros(2), "gamma": torch.ones(1)}
    with pytest.raises((ValueError, TypeError), match=said):
        scalar_mix(**{**good, **change})
