"""LoRA as one product a layer is as near to fp64 as peft's, in fp32 and in bf16, follows every change, and is peft's where it
does not apply."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from regraft.engine.half_weights import HALF, bind_half_weights
from regraft.engine.methods.added_lora import AddedLora, added_lora, fits
from regraft.engine.methods.speed import bind_added_lora
from regraft.engine.models import RunningModel
from regraft.engine.packing import pack
from regraft.engine.training.optimizer import clipped_step
from regraft.kernels import linear_native


@pytest.fixture(params=[True, False], ids=["bf16", "fp32"])
def half(request):
    return request.param


@pytest.fixture(params=["c", "torch"], autouse=True)
def products(request, half, any_vendor, monkeypatch):
    if request.param == "torch":  # as on a processor that has neither tiles nor long vectors
        monkeypatch.setattr(linear_native, "runs_here", lambda weight: False)
    elif not linear_native.runs_here(torch.zeros(32, 32, dtype=HALF if half else torch.float32)):
        pytest.skip("a processor that has neither tiles (AMX) nor long vectors (AVX-512) for this type")


NAMES = ("query", "key", "value")


class Projections(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Linear(inputs, outputs, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, name)(x) for name in NAMES], dim=-1)


def adapted(inputs: int = 64, outputs: int = 96, rank: int = 8, *, bias: bool = True, **options) -> Projections:
    """Three frozen projections, their LoRA pairs drawn large enough to count."""
    model = get_peft_model(
        Projections(inputs, outputs, bias),
        LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=list(NAMES), **options),
    ).base_model.model
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    return model


def layers(model: Projections, count: int) -> list:
    return [getattr(model, name) for name in NAMES[:count]]


def results(model: Projections, count: int, x: Tensor, dy: Tensor, how, gelu: bool = False) -> list[Tensor]:
    """Output, and gradients of x and of every pair."""
    x = x.detach().clone().requires_grad_()
    parts = layers(model, count)
    y = how(parts, x)
    if gelu:
        y = torch.nn.functional.gelu(y)
    pairs = [p.lora_A.default.weight for p in parts] + [p.lora_B.default.weight for p in parts]
    return [y.detach(), *torch.autograd.grad(y, [x, *pairs], dy.to(y.dtype))]


def by_peft(parts: list, x: Tensor) -> Tensor:
    return torch.cat([part(x) for part in parts], dim=-1)


def autocast(half: bool):
    return torch.autocast("cpu", HALF, enabled=half)


def within(half: bool, how):
    def run(parts: list, x: Tensor) -> Tensor:
        with autocast(half):
            return how(parts, x)

    return run


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape and not found.isnan().any()
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("rows", "draws"), [(1, 40), (33, 4), (700, 1)])
@pytest.mark.parametrize(("count", "rank", "inputs"), [(1, 8, 64), (3, 8, 64), (3, 17, 64), (1, 32, 64), (3, 8, 40)])
@pytest.mark.parametrize("gelu", [False, True])
def test_output_and_gradients_are_as_near_to_fp64_as_pefts(rows, draws, count, rank, inputs, gelu, half):
    # One row's gradient is made of eight rounded numbers: what it is off by says little, the mean over many rows does.
    ours, theirs = [], []
    for _ in range(draws):
        model = adapted(inputs, rank=rank)
        x, dy = torch.randn(rows, inputs), torch.randn(rows, 96 * count)
        lora = AddedLora(layers(model, count), half=half)
        assert fits(lora.layers)
        found = results(model, count, x, dy, within(half, lambda _, x, lora=lora: added_lora(x, lora, gelu)))
        plain = results(model, count, x, dy, within(half, by_peft), gelu)
        exact = results(copy.deepcopy(model).double(), count, x.double(), dy.double(), by_peft, gelu)
        ours.append([error(one, wanted) for one, wanted in zip(found, exact, strict=True)])
        theirs.append([error(one, wanted) for one, wanted in zip(plain, exact, strict=True)])
    more = 1.2 if half else 2.0  # in fp32 sums are of other orders, and a few rows say less
    assert torch.all(torch.tensor(ours).mean(0) <= more * torch.tensor(theirs).mean(0))
    assert found[0].dtype == (HALF if half else torch.float32) and all(g.dtype == torch.float32 for g in found[1:])


def test_it_follows_an_optimizer_a_copy_and_memory_put_in_place(half):
    model = adapted()
    lora, x = AddedLora(layers(model, 3), half=half), torch.randn(40, 64)
    parts = [*(p.lora_A.default.weight for p in lora.layers), *(p.lora_B.default.weight for p in lora.layers)]
    optimizer = torch.optim.AdamW(parts, lr=0.1, fused=True)

    def stepped() -> None:
        added_lora(x, lora).square().sum().backward()
        clipped_step(optimizer, torch.tensor(1.0), 1.0)

    changes = [
        stepped,
        lambda: [part.copy_(part * 0.5) for part in parts],
        lambda: [setattr(part, "data", part.data + 0.05) for part in parts],
        lambda: lora.layers[1].base_layer.weight.mul_(2.0),
        lambda: setattr(lora.layers[2].lora_B, "default", nn.Linear(8, 96, bias=False)),
    ]
    before = added_lora(x, lora).detach()
    for change in changes:
        with torch.set_grad_enabled(change is stepped):
            change()
        now = added_lora(x, lora).detach()
        assert not torch.equal(now, before)
        wanted = within(half, by_peft)(lora.layers, x).detach()
        assert (now - wanted).abs().max() <= (2**-6 if half else 1e-5) * wanted.abs().max()
        before = now


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"rank_pattern": {"key": 4}}], ids=str)
def test_what_is_not_one_plain_pair_of_one_kind_is_left_to_peft(options):
    assert not fits(layers(adapted(**options), 3))


def pair(folder, half: bool) -> tuple[RunningModel, RunningModel]:
    """The same adapted model twice: as peft has it, and bound."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.2)
    wanted = LoraConfig(r=4, lora_alpha=8, target_modules=[*NAMES, "dense"], modules_to_save=["classifier"])
    model = get_peft_model(model, wanted).base_model.model
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    both = []
    for bound in (False, True):
        running = RunningModel(copy.deepcopy(model), pad_token_id=0)
        running.run_packed()
        running.use_kernels()
        if bound:
            assert not half or bind_half_weights(running)
            assert bind_added_lora(running, half=half) == 13  # six of each layer, and the pooler
        both.append(running.eval())
    return both[0], both[1]


def logits(running: RunningModel, half: bool) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    batch = pack([torch.randint(5, 60, (n,), generator=generator).numpy() for n in (3, 17, 1, 9)])
    with autocast(half):
        return running(batch).float()


def gradients(running: RunningModel, half: bool) -> dict[str, Tensor]:
    running.zero_grad(set_to_none=True)
    logits(running, half).square().sum().backward()
    return {n: p.grad for n, p in running.model.named_parameters() if p.grad is not None}


def close(found: Tensor, wanted: Tensor, half: bool) -> bool:
    return bool((found - wanted).abs().max() <= (2**-5 if half else 1e-4) * wanted.abs().max() + 1e-6)


def test_a_bound_model_gives_the_logits_and_gradients_of_peft(tiny_model, half):
    plain, bound = pair(tiny_model, half)
    assert close(logits(bound, half), logits(plain, half), half)
    ours, theirs, exact = gradients(bound, half), gradients(plain, half), gradients(plain, False)
    assert ours.keys() == theirs.keys() and len(theirs) > 20
    for name, wanted in exact.items():
        assert error(ours[name], wanted) <= (2 * error(theirs[name], wanted) + 2e-3 if half else 1e-4), name
    layer = bound.model.base_model.encoder.layer[0]
    calls = [layer.attention.self, layer.intermediate, layer.output.dense]
    assert all("forward" in vars(module) for module in calls)


def test_adapters_that_are_merged_changed_or_switched_off_are_followed(tiny_model, half):
    plain, bound = pair(tiny_model, half)

    def each(change) -> None:
        for running in (plain, bound):
            for module in running.model.modules():
                if isinstance(module, BaseTunerLayer) and hasattr(module, "lora_A"):
                    change(module)

    def grow(module) -> None:
        with torch.no_grad():
            module.lora_B.default.weight.mul_(1.5)

    seen = [logits(bound, half)]
    for change, differs in (
        (lambda m: m.merge(), False),
        (lambda m: m.unmerge(), False),
        (grow, True),
        (lambda m: m.merge(), False),
        (lambda m: m.unmerge(), False),
        (lambda m: m.enable_adapters(False), True),
    ):
        each(change)
        seen.append(logits(bound, half))
        assert close(seen[-1], logits(plain, half), half)
        assert differs == (not close(seen[-1], seen[-2], half))
