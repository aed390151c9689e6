"""The chunked linear cross-entropy against fp64, in plain torch and in Triton."""

from __future__ import annotations

import pytest
import torch

from checking import (
    DEVICE,
    Measured,
    both_forms,
    each_dtype,
    fresh,
    hold_gradients_to_finite_differences,
    hold_over_draws,
    poisoned,
    same_bits_twice,
)
from regraft.kernels import cross_entropy
from regraft.kernels.choice import forced
from regraft.kernels.cross_entropy import masked_cross_entropy

NAMES = ("loss", "hidden", "weight", "bias")


def inputs(tokens: int, width: int, vocabulary: int) -> list[torch.Tensor]:
    return [fresh(tokens, width), fresh(vocabulary, width, scale=width**-0.5), fresh(vocabulary)]


def some_targets(count: int, vocabulary: int, ignored: int = 0) -> torch.Tensor:
    targets = torch.randint(vocabulary, (count,), device=DEVICE)
    targets[torch.randperm(count, device=DEVICE)[:ignored]] = -100
    return targets


@both_forms
@each_dtype
@pytest.mark.parametrize(
    "tokens, width, vocabulary, chunk, smoothing", [(120, 64, 997, 16, 0.0), (97, 384, 1000, None, 0.1), (1, 32, 2, 1, 0.0)]
)  # fmt: skip
def test_it_is_as_near_to_fp64_as_plain_torch(form, dtype, tokens, width, vocabulary, chunk, smoothing):
    def measure():
        values = [x.to(dtype).double() for x in inputs(tokens, width, vocabulary)]
        rows = torch.randperm(tokens, device=DEVICE)[: max(1, tokens // 4)]
        targets = some_targets(len(rows), vocabulary, ignored=len(rows) // 5)

        def results(function, of, **options):
            leaves = [x.to(of).clone().requires_grad_() for x in values]
            loss = function(*leaves, targets, rows, label_smoothing=smoothing, **options)
            (loss * 0.37).backward()
            return [loss.detach(), *(x.grad for x in leaves)]

        def in_chunks(h, w, b, t, at, **options):
            # the BLAS sums in another order for few rows: plain torch is measured in the same chunks
            step = chunk or len(at)
            pieces = zip(t.split(step), at.split(step), strict=True)
            return sum(cross_entropy.reference(h, w, b, x, y, **options) for x, y in pieces)

        exact = results(cross_entropy.reference, torch.float64)
        plain = results(in_chunks, dtype)
        with forced(form), poisoned():
            found = results(masked_cross_entropy, dtype, chunk_rows=chunk)
        # 4: a product over the vocabulary is summed in another order where memory is laid out otherwise
        return [Measured.of(*each, roundings=4, to=dtype) for each in zip(NAMES, exact, plain, found, strict=True)]

    hold_over_draws(measure)


@both_forms
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradients_are_those_of_finite_differences(form, smoothing):
    targets = torch.tensor([3, 0, -100, 4], device=DEVICE)
    rows = torch.tensor([5, 1, 2, 1], device=DEVICE)  # a row may be asked twice
    hold_gradients_to_finite_differences(
        lambda h, w, b: masked_cross_entropy(h, w, b, targets, rows, label_smoothing=smoothing, chunk_rows=3),
        inputs(6, 4, 7),
        form,
    )


@both_forms
def test_far_logits_stay_finite(form):
    hidden = torch.tensor([[1.0], [-1.0]], device=DEVICE)
    weight = torch.tensor([[300.0], [-300.0], [0.0]], device=DEVICE).requires_grad_()
    with forced(form):
        loss = masked_cross_entropy(hidden, weight, None, torch.tensor([1, 1], device=DEVICE))
        loss.backward()
    assert float(loss.detach()) == 600.0
    assert torch.isfinite(weight.grad).all()


@both_forms
def test_only_what_is_asked_for_is_computed_and_evaluation_needs_no_gradient(form):
    hidden, weight, bias = (x.float() for x in inputs(12, 8, 30))
    targets = some_targets(12, 30)
    hidden.requires_grad_()
    with forced(form):
        out = cross_entropy._loss(hidden, weight, bias, targets, -100, 0.0, 5, True, False, False)
        assert [x.numel() for x in out] == [1, 96, 0, 0]
        with torch.no_grad():
            loss = masked_cross_entropy(hidden, weight, bias, targets)
    assert torch.allclose(loss, cross_entropy.reference(hidden, weight, bias, targets), rtol=1e-5)


@both_forms
@pytest.mark.parametrize("targets", [[], [-100, -100]])
def test_no_rows_and_no_targets_give_zero(form, targets):
    leaves = [x.float().requires_grad_() for x in inputs(4, 8, 16)]
    rows = torch.arange(len(targets), device=DEVICE)
    with forced(form), poisoned():
        loss = masked_cross_entropy(*leaves, torch.tensor(targets, dtype=torch.int64, device=DEVICE), rows)
        loss.backward()
    assert float(loss.detach()) == 0.0
    assert not any(x.grad.any() for x in leaves)


@both_forms
def test_fp32_weights_serve_bf16_rows(form):
    hidden, weight, bias = inputs(20, 16, 40)
    hidden, weight, bias = hidden.bfloat16().requires_grad_(), weight.float().requires_grad_(), bias.float()
    targets = some_targets(20, 40)
    with forced(form):
        loss = masked_cross_entropy(hidden, weight, bias, targets)
        loss.backward()
    assert torch.allclose(loss, cross_entropy.reference(hidden.float(), weight, bias, targets), rtol=2e-2)
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


@both_forms
def test_two_runs_give_the_same_bits(form):
    leaves = [x.float().requires_grad_() for x in inputs(20, 16, 99)]
    targets = some_targets(20, 99, ignored=3)

    def run() -> list[torch.Tensor]:
        loss = masked_cross_entropy(*leaves, targets, chunk_rows=8)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    same_bits_twice(run, form)


def test_the_operator_is_registered_in_full_and_compiles_into_one_graph():
    leaves = [x.float().requires_grad_() for x in inputs(6, 8, 12)]
    targets = some_targets(6, 12)
    torch.library.opcheck(cross_entropy._loss, (*leaves, targets, -100, 0.1, 4, True, True, True))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def go(h):
        return masked_cross_entropy(h * 2, leaves[1], leaves[2], targets)

    go(leaves[0]).backward()
    wanted = cross_entropy.reference(leaves[0] * 2, leaves[1], leaves[2], targets)
    assert torch.allclose(go(leaves[0]), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"weight": torch.zeros(7, 3)}, r"weight: shape is \[7, 3\], expected \[any, 4\]"),
        ({"bias": torch.zeros(6)}, r"bias: shape is \[6\], expected \[7\]"),
        ({"targets": torch.tensor([1, 2])}, r"targets: shape is \[2\], expected \[3\]"),
        ({"targets": torch.tensor([1, 7, 0])}, "targets: holds 7, expected 0 to 6 or -100"),
        ({"rows": torch.tensor([0, 5, 1])}, "rows: holds 5, expected 0 to 4"),
        ({"label_smoothing": 1.0}, "label_smoothing: is 1.0"),
        ({"chunk_rows": 0}, "chunk_rows: is 0"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name(change, said):
    good = {
        "hidden": torch.zeros(5, 4), "weight": torch.zeros(7, 4), "bias": torch.zeros(7),
        "targets": torch.tensor([1, 2, -100]), "rows": torch.tensor([0, 2, 4]),
    }  # fmt: skip
    with pytest.raises((ValueError, IndexError), match=said):
        masked_cross_entropy(**{**good, **change})
