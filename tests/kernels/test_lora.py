"""The LoRA layer against fp64 and against the merged weight; dropout; what trains and what does not."""

from __future__ import annotations

import pytest
import torch

from checking import DEVICE, each_dtype, fresh, hold_gradients_to_finite_differences, hold_to_twice_the_error
from regraft.kernels import lora
from regraft.kernels.lora import lora_linear

NAMES = ("x", "weight", "bias", "a q", "a v", "b q", "b v")
FORM = "reference"  # it has one form: every product is the BLAS's


def inputs(rows: int, width: int, out: int = 0, ranks: tuple[int, int] = (8, 4)) -> list[torch.Tensor]:
    """A merged query-key-value layer with updates of its queries and values: x, weight, bias, a q, a v, b q, b v."""
    first, second = ranks
    a = [fresh(first, width, scale=width**-0.5), fresh(second, width, scale=width**-0.5)]
    b = [fresh(out or width, first), fresh(out or width, second)]
    return [fresh(rows, width), fresh(3 * width, width, scale=width**-0.5), fresh(3 * width), *a, *b]


def adapted(x, weight, bias, a_q, a_v, b_q, b_v, function=lora_linear, **options):
    return function(x, weight, bias, [a_q, a_v], [b_q, b_v], 2.0, columns=[0, 2 * x.shape[-1]], **options)


@each_dtype
@pytest.mark.parametrize("rows, width", [(97, 384), (1, 768), (3, 1000), (1025, 40)])
def test_it_is_as_near_to_fp64_as_plain_torch(dtype, rows, width):
    plain = lambda *t: adapted(*t, function=lora.reference)  # noqa: E731
    hold_to_twice_the_error(adapted, plain, inputs(rows, width), dtype, form=FORM, names=NAMES)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gradients_are_those_of_finite_differences(p):
    def go(*tensors):
        torch.manual_seed(3)
        return adapted(*tensors, p=p)

    hold_gradients_to_finite_differences(go, inputs(4, 5, ranks=(2, 3)), FORM)


def test_it_is_the_merged_weight():
    x, weight, bias, a_q, a_v, b_q, b_v = inputs(11, 16)
    merged = weight.clone()
    merged[:16] += 2.0 * b_q @ a_q
    merged[32:] += 2.0 * b_v @ a_v
    found = adapted(x.view(1, 11, 16), weight, bias, a_q, a_v, b_q, b_v, p=0.5, training=False)
    assert torch.allclose(found[0], torch.nn.functional.linear(x, merged, bias))


def test_the_updates_alone_add_to_any_other_layer():
    x, weight, bias, *rest = inputs(7, 16)
    alone = adapted(x, None, None, *rest, out_features=48)
    assert torch.allclose(alone + torch.nn.functional.linear(x, weight, bias), adapted(x, weight, bias, *rest))
    assert lora_linear(x, None, None, [rest[0]], [rest[2]], 1.0).shape == (7, 16)


def test_frozen_weights_get_no_gradient_and_adapters_do():
    x, weight, bias, *rest = inputs(7, 16)
    rest = [t.requires_grad_() for t in rest]
    adapted(x, weight, bias, *rest).square().sum().backward()
    assert x.grad is None and weight.grad is None and bias.grad is None
    assert all(t.grad.abs().sum() > 0 for t in rest)


def test_dropout_keeps_the_mean_and_touches_only_the_updates():
    x = torch.ones(400, 64, device=DEVICE)
    weight = torch.eye(64, device=DEVICE)
    a, b = torch.full((1, 64), 1 / 64, device=DEVICE), torch.ones(64, 1, device=DEVICE)
    torch.manual_seed(0)
    y = lora_linear(x, weight, None, [a], [b], 1.0, p=0.25)
    update = y - 1
    assert abs(float(update.mean()) - 1.0) < 0.02
    assert 0.03 < float(update[:, 0].std()) < 0.12  # sqrt(0.25 / 0.75 / 64) = 0.072
    torch.manual_seed(0)
    assert torch.equal(y, lora_linear(x, weight, None, [a], [b], 1.0, p=0.25))


def test_adapters_in_fp32_serve_bf16_rows_and_autocast():
    tensors = [t.float() for t in inputs(9, 32)]
    wanted = adapted(*tensors)
    mixed = adapted(tensors[0].bfloat16(), *tensors[1:])
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = adapted(*tensors)
    assert mixed.dtype == cast.dtype == torch.bfloat16
    assert torch.equal(mixed, cast)
    assert torch.allclose(mixed.float(), wanted, atol=0.25, rtol=0.05)


def test_no_rows_give_no_rows_and_gradients_of_zero():
    leaves = [t.requires_grad_() for t in inputs(0, 8)]
    y = adapted(*leaves, p=0.1)
    y.sum().backward()
    assert y.shape == (0, 24)
    assert not any(t.grad.any() for t in leaves)


def test_the_operator_is_registered_in_full_and_compiles_into_one_graph():
    x, weight, bias, a_q, a_v, b_q, b_v = leaves = [t.float().requires_grad_() for t in inputs(5, 8)]
    keep = torch.rand(5, 8, device=DEVICE) > 0.5
    a = torch.cat([a_q, a_v]).detach().requires_grad_()
    torch.library.opcheck(lora._lora, (x, weight, bias, a, [b_q, b_v], [0, 16], [2.0, 2.0], keep, 2.0, 24))

    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    compiled(*leaves, p=0.1).sum().backward()
    assert torch.isfinite(x.grad).all()
    torch.compiler.reset()
    assert torch.allclose(compiled(*leaves), adapted(*leaves, function=lora.reference), atol=1e-4)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"weight": torch.zeros(24, 7)}, r"weight: shape is \[24, 7\], expected \[any, 8\]"),
        ({"a": [torch.zeros(2, 8)]}, "b: has 2 parts, expected 1"),
        ({"a": [torch.zeros(2, 8), torch.zeros(3, 8)]}, r"b\[1\]: shape is \[8, 2\], expected \[any, 3\]"),
        ({"columns": [0, 17]}, r"columns\[1\]: 17 to 25, expected within 0 to 24"),
        ({"weight": None, "out_features": 24}, "bias: is given without weight"),
        ({"p": 1.0}, "p: is 1.0"),
        ({"scale": [1.0]}, "scale: has 1 parts"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name(change, said):
    good = {
        "x": torch.zeros(5, 8), "weight": torch.zeros(24, 8), "bias": torch.zeros(24), "scale": 1.0,
        "a": [torch.zeros(2, 8), torch.zeros(2, 8)], "b": [torch.zeros(8, 2), torch.zeros(8, 2)], "columns": [0, 16],
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=said):
        lora_linear(**{**good, **change})
