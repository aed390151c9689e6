"""Segment pooling and L2 normalisation against fp64, in plain torch and in Triton."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from checking import (
    DEVICE,
    both_forms,
    each_dtype,
    fresh,
    hold_gradients_to_finite_differences,
    hold_to_twice_the_error,
    poisoned,
    same_bits_twice,
)
from regraft.kernels import pooling
from regraft.kernels.choice import forced
from regraft.kernels.pooling import KINDS, l2_normalise, segment_pool

each_kind = pytest.mark.parametrize("kind", KINDS)


def packed(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)


@both_forms
@each_dtype
@each_kind
@pytest.mark.parametrize(
    "lengths, width, normalise",
    [((1, 97, 0, 33), 384, False), ((65,), 1000, True), ((2, 1025), 64, False), ((3, 7), 768, False)],
)
def test_it_is_as_near_to_fp64_as_plain_torch(form, dtype, kind, lengths, width, normalise):
    cu = packed(*lengths)
    hold_to_twice_the_error(
        lambda x: segment_pool(x, cu, kind, normalise=normalise),
        lambda x: pooling.reference(x, cu, kind, normalise=normalise),
        [fresh(sum(lengths), width)],
        dtype,
        form=form,
        names=("x",),
    )


@both_forms
@each_kind
def test_gradients_are_those_of_finite_differences(form, kind):
    cu = packed(3, 0, 1, 4)
    hold_gradients_to_finite_differences(lambda x: segment_pool(x, cu, kind), [fresh(8, 5)], form)
    # an empty segment has no direction: it is left out here
    cu = packed(3, 1, 4)
    hold_gradients_to_finite_differences(lambda x: segment_pool(x, cu, kind, normalise=True), [fresh(8, 5)], form)


@both_forms
def test_a_vector_shorter_than_eps_is_scaled_and_its_gradient_is_finite(form):
    x = torch.zeros(2, 8, device=DEVICE)
    x[1] = 1e-3
    x.requires_grad_()
    with forced(form):
        y = l2_normalise(x, eps=0.1)
        y.sum().backward()
    assert torch.allclose(y.detach(), x.detach() * 10)
    assert torch.allclose(x.grad, torch.full_like(x, 10.0))


@both_forms
def test_of_equal_largest_values_the_first_row_gets_the_gradient(form):
    x = torch.ones(5, 3, device=DEVICE, requires_grad=True)
    with forced(form):
        segment_pool(x, packed(2, 3), "max").sum().backward()
    assert x.grad[:, 0].tolist() == [1, 0, 1, 0, 0]


@both_forms
def test_what_is_not_a_number_is_not_lost_among_larger_ones(form):
    x = torch.arange(12.0, device=DEVICE).view(4, 3)
    x[1, 0] = x[2, 0] = float("nan")
    x.requires_grad_()
    with forced(form):
        y = segment_pool(x, packed(4), "max")
        y.sum().backward()
    assert torch.isnan(y[0, 0]) and y[0, 1:].tolist() == [10, 11]
    assert x.grad.tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 1, 1]]


@both_forms
@each_kind
def test_no_rows_and_empty_segments_give_zeros(form, kind):
    x = torch.zeros(0, 16, device=DEVICE, requires_grad=True)
    with forced(form), poisoned():
        y = segment_pool(x, packed(0, 0), kind, normalise=True)
        y.sum().backward()
        assert segment_pool(x, packed(), kind).shape == (0, 16)
    assert y.shape == (2, 16)
    assert not y.any()
    assert x.grad.shape == (0, 16)


@both_forms
@each_kind
def test_two_runs_give_the_same_bits(form, kind):
    x, cu = fresh(70, 40).float(), packed(50, 20)

    def run() -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        y = segment_pool(leaf, cu, kind, normalise=True)
        y.square().sum().backward()
        return [y.detach(), leaf.grad]

    same_bits_twice(run, form)


def test_the_operators_are_registered_in_full_and_compile_into_one_graph():
    x, cu = fresh(9, 8).float().requires_grad_(), packed(4, 5)
    for kind in range(len(KINDS)):
        torch.library.opcheck(pooling._pool, (x, cu, kind))
    torch.library.opcheck(pooling._normalise, (x, 1e-12))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def go(x):
        return segment_pool(x * 2, cu, "mean", normalise=True)

    go(x).sum().backward()
    assert torch.allclose(go(x), pooling.reference(x, cu, "mean", normalise=True), atol=1e-5)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"kind": "cls"}, "kind: is 'cls', expected one of mean, max, first"),
        ({"x": torch.zeros(5)}, r"x: shape is \[5\], expected \[any, any\]"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens: is 0 to 4, expected 0 to 5"),
        ({"cu_seqlens": torch.tensor([0, 6, 5])}, "cu_seqlens: falls"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, "cu_seqlens: dtype is float32"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name(change, said):
    good = {"x": torch.zeros(5, 4), "cu_seqlens": torch.tensor([0, 2, 5]), "kind": "mean"}
    with pytest.raises((ValueError, TypeError), match=said):
        segment_pool(**{**good, **change})
