"""Linear layers bound to products in C: as near to fp64 as torch's, followed by whoever listens, left where they do not pay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from regraft.engine.models import RunningModel
from regraft.engine.packing import pack
from regraft.engine.products import bind_products
from regraft.kernels import linear_native
from regraft.kernels.linear_native import FEW


@pytest.fixture(autouse=True)
def in_c(any_vendor):
    if not linear_native.runs_here(torch.zeros(32, 32)):
        pytest.skip("products in fp32 are not computed in C on this processor")


@pytest.fixture
def calls(monkeypatch):
    """The functions in C that were called, by name."""
    names: list[str] = []
    call = linear_native._call
    forms = linear_native.VECTORS
    monkeypatch.setattr(linear_native, "_call", lambda which, *rest: names.append(forms[which]) or call(which, *rest))
    return names


def classifier(folder) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    for weight in model.parameters():
        if weight.dim() > 1:  # larger than the usual start, so that mistakes show
            nn.init.normal_(weight, std=0.2)
    return model


def bound(model: nn.Module) -> RunningModel:
    running = RunningModel(copy.deepcopy(model), pad_token_id=0)
    running.run_packed()
    running.use_kernels()
    return running.eval()


def batch():
    generator = torch.Generator().manual_seed(2)
    return pack([torch.randint(5, 60, (n,), generator=generator).numpy() for n in (30, 17, 1, 9)])


def outcome(running: RunningModel) -> dict[str, torch.Tensor]:
    running.zero_grad(set_to_none=True)
    logits = running(batch())
    logits.square().sum().backward()
    return {n: p.grad for n, p in running.model.named_parameters() if p.grad is not None} | {"logits": logits.detach()}


def test_logits_and_gradients_are_as_near_to_fp64_as_torchs(tiny_model, calls, monkeypatch):
    model = classifier(tiny_model)
    found = outcome(bound(model))
    assert set(calls) == set(linear_native.VECTORS)  # gradients of weights and of GELU too
    exact = RunningModel(copy.deepcopy(model).double(), pad_token_id=0)
    exact.run_packed()
    wanted = outcome(exact.eval())
    calls.clear()
    monkeypatch.setattr(linear_native, "runs_here", lambda weight: False)
    plain = outcome(bound(model))
    assert not calls and found.keys() == plain.keys() == wanted.keys()
    for name, exactly in wanted.items():
        ours, theirs = (float((each[name].double() - exactly).abs().max()) for each in (found, plain))
        # of numbers that cancel to nothing (a key's bias) only that is left which fp32 cannot tell from it
        assert ours <= 3 * theirs + 2e-6 * float(wanted["logits"].abs().max()), name


@pytest.mark.parametrize("biased", [True, False])
def test_what_is_frozen_gets_no_gradient(biased, calls):
    torch.manual_seed(1)
    layer = nn.Linear(64, 32, bias=biased)
    assert bind_products(nn.Sequential(layer)) == 1
    x = torch.randn(3, FEW, 64, requires_grad=True)
    layer.requires_grad_(False)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, FEW, 64))
    assert layer.weight.grad is None and "regraft_slopes" not in calls
    if biased:
        layer.bias.requires_grad_()
        layer(x.detach()).sum().backward()
        assert layer.weight.grad is None and layer.bias.grad.tolist() == [3.0 * FEW] * 32


@pytest.mark.parametrize(
    "case", ["few rows", "an odd width", "autocast", "fp64", "kernels off"], ids=lambda case: case.replace(" ", "-")
)
def test_where_it_does_not_pay_torch_computes(case, calls, monkeypatch):
    width = 48 if case == "an odd width" else 64
    rows = FEW - 1 if case == "few rows" else FEW
    layer, x = nn.Linear(width, 32), torch.randn(rows, width)
    bind_products(nn.Sequential(layer))
    if case == "fp64":
        layer, x = layer.double(), x.double()
    if case == "kernels off":
        monkeypatch.setenv("REGRAFT_KERNELS", "reference")
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        found, wanted = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    assert not calls and found.dtype == wanted.dtype and torch.equal(found, wanted)


def test_few_rows_and_many_have_the_same_graph():
    """Processes that share out gradients as they come have rows of their own, and would mix up what comes in another order."""
    layer = nn.Linear(64, 32)
    bind_products(nn.Sequential(layer))
    few, many = (layer(torch.randn(rows, 64)) for rows in (1, FEW))
    assert few.grad_fn.name() == many.grad_fn.name() != "AddmmBackward0"
    with torch.no_grad():
        x = torch.randn(1, 64)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_whoever_listens_to_a_part_is_called(tiny_model, calls):
    model = classifier(tiny_model)
    heard = []
    model.base_model.encoder.layer[1].intermediate.dense.register_forward_hook(lambda *_: heard.append(1))
    running = RunningModel(model, pad_token_id=0)
    running.run_packed()
    running.use_kernels()
    heard.clear()  # packed running was proven
    running.eval()(batch())
    assert heard == [1] and calls


def test_an_output_may_be_changed_in_place():
    layer, x = nn.Linear(64, 32), torch.randn(3, FEW, 64)
    bind_products(nn.Sequential(layer))
    layer(x).relu_().sum().backward()
    found, layer.weight.grad = layer.weight.grad, None
    nn.functional.linear(x, layer.weight, layer.bias).relu().sum().backward()
    torch.testing.assert_close(found, layer.weight.grad, rtol=1e-4, atol=1e-4)


def test_a_frozen_layer_keeps_no_input_for_the_backward():
    layer = nn.Linear(64, 32).requires_grad_(False)
    bind_products(nn.Sequential(layer))
    x = torch.randn(FEW, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        layer(x * 2).sum()
    assert (FEW, 64) not in kept and (32, 64) in kept


def test_parameters_and_state_dict_never_notice(tiny_model):
    model = classifier(tiny_model)
    running = bound(model)
    ours, theirs = running.model.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)
    running.run_padded("to see")
    assert not any("forward" in vars(m) for m in running.model.modules())


def test_a_weight_that_changes_before_its_gradient_is_refused():
    layer, x = nn.Linear(64, 32), torch.randn(FEW, 64, requires_grad=True)
    bind_products(nn.Sequential(layer))
    out = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
