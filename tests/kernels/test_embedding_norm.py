"""Embedding sum + LayerNorm + dropout against fp64, in plain torch and in Triton; its gradient has no atomics."""

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
from regraft.kernels import embedding_norm
from regraft.kernels.choice import forced
from regraft.kernels.embedding_norm import embedding_layer_norm
from regraft.kernels.philox import make_seed


def draw(tokens: int, words: int = 50, places: int = 20, kinds: int = 2) -> list[torch.Tensor]:
    return [torch.randint(0, n, (tokens,), device=DEVICE) for n in (words, places, kinds)]


def tables(width: int, words: int = 50, places: int = 20, kinds: int = 2) -> list[torch.Tensor]:
    return [fresh(words, width), fresh(places, width), fresh(kinds, width), fresh(width) * 0.2 + 1, fresh(width)]


@both_forms
@each_dtype
@pytest.mark.parametrize("tokens, width", [(1, 384), (97, 1000), (5, 768), (3, 4)])
def test_it_is_as_near_to_fp64_as_plain_torch(form, dtype, tokens, width):
    index = draw(tokens)
    options = {"p": 0.1, "seed": make_seed(3, DEVICE), "site": 2, "eps": 1e-6, "padding_idx": 0}
    hold_to_twice_the_error(
        lambda *t: embedding_layer_norm(*index, *t, **options),
        lambda *t: embedding_norm.reference(*index, *t, **options),
        tables(width),
        dtype,
        form=form,
        names=("word", "position", "type", "weight", "bias"),
    )


@both_forms
def test_long_runs_of_one_word_and_no_types(form):
    ids, positions = torch.zeros(1025, dtype=torch.int64, device=DEVICE), draw(1025)[1]
    ids[::7] = 3
    hold_to_twice_the_error(
        lambda word, position, weight: embedding_layer_norm(ids, positions, None, word, position, None, weight),
        lambda word, position, weight: embedding_norm.reference(ids, positions, None, word, position, None, weight),
        [fresh(5, 6), fresh(20, 6), fresh(6)],
        torch.float32,
        form=form,
    )


@both_forms
def test_gradients_are_those_of_finite_differences(form):
    index, seed = draw(4, 3, 3, 2), make_seed(1, DEVICE)
    hold_gradients_to_finite_differences(
        lambda *t: embedding_layer_norm(*index, *t, p=0.3, seed=seed, eps=1e-5), tables(6, 3, 3, 2), form
    )


@both_forms
def test_the_padding_row_gets_no_gradient_and_unread_rows_zero(form):
    ids = torch.tensor([1, 0, 1, 2], device=DEVICE)
    leaves = [t.float().requires_grad_() for t in tables(8, 5)]
    with forced(form):
        out = embedding_layer_norm(ids, ids * 0, ids * 0, *leaves, padding_idx=0)
        (out * torch.arange(8, device=DEVICE)).sum().backward()
    touched = leaves[0].grad.abs().sum(1) > 0
    assert touched.tolist() == [False, True, True, False, False]


@both_forms
def test_no_tokens_give_no_rows_and_gradients_of_zero(form):
    leaves = [t.requires_grad_() for t in tables(8)]
    with forced(form):
        embedding_layer_norm(*draw(0), *leaves).sum().backward()
    assert all(not t.grad.any() for t in leaves)


@both_forms
def test_two_runs_give_the_same_bits(form):
    index = draw(200, words=4)
    leaves = [t.float().requires_grad_() for t in tables(40, words=4)]
    seed = make_seed(2, DEVICE)
    same_bits_twice(
        lambda: torch.autograd.grad(embedding_layer_norm(*index, *leaves, p=0.1, seed=seed).square().sum(), leaves),
        form,
    )


def test_the_operator_is_registered_in_full_and_compiles_into_one_graph():
    index, leaves = draw(5), [t.requires_grad_() for t in tables(8)]
    torch.library.opcheck(embedding_norm._forward, (*index, *leaves, None, 0.0, 0, 1e-5, -1, torch.float64))
    compiled = torch.compile(lambda *t: embedding_layer_norm(*index, *t), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*leaves), embedding_norm.reference(*index, *leaves))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"ids": torch.zeros(3, dtype=torch.int32)}, "ids: dtype is int32, expected int64"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, r"positions: shape is \[2\], expected \[3\]"),
        ({"position": torch.zeros(9, 7)}, "position: shape"),
        ({"types": None}, "types: is None"),
        ({"weight": torch.zeros(7)}, "weight: shape"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name(change, said):
    index = torch.zeros(3, dtype=torch.int64)
    good = {"ids": index, "positions": index, "types": index, "word": torch.zeros(9, 8), "position": torch.zeros(9, 8)}
    good |= {"type_table": torch.zeros(2, 8), "weight": torch.zeros(8), "bias": torch.zeros(8)}
    with pytest.raises((ValueError, TypeError), match=said):
        embedding_layer_norm(**{**good, **change})
