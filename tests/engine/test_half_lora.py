"""LoRA over bf16 weights is as near to fp64 as autocast's own, follows every change, and is peft's where it does not apply."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from regraft.engine.half_weights import HALF, bind_half_weights
from regraft.engine.methods.half_lora import HalfLora, fits, half_lora
from regraft.engine.methods.speed import bind_half_lora
from regraft.engine.models import RunningModel
from regraft.engine.packing import pack
from regraft.engine.training.optimizer import clipped_step
from regraft.kernels import linear_native

tiles = pytest.mark.skipif(
    not linear_native.runs_here(torch.zeros(32, 32, dtype=HALF)),
    reason="a processor that multiplies bf16 neither by tiles (AMX) nor by vectors (AVX-512)",
)


@pytest.fixture(params=[pytest.param("tiles", marks=tiles), "torch"], autouse=True)
def products(request, monkeypatch):
    if request.param == "torch":  # as on a processor that does neither
        monkeypatch.setattr(linear_native, "runs_here", lambda weight: False)


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


def under_autocast(how):
    def run(parts: list, x: Tensor) -> Tensor:
        with torch.autocast("cpu", HALF):
            return how(parts, x)

    return run


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape and not found.isnan().any()
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("rows", "draws"), [(1, 40), (33, 4), (700, 1)])
@pytest.mark.parametrize(("count", "rank", "inputs"), [(1, 8, 64), (3, 8, 64), (3, 17, 64), (1, 32, 64), (3, 8, 40)])
@pytest.mark.parametrize("gelu", [False, True])
def test_output_and_gradients_are_as_near_to_fp64_as_autocasts(rows, draws, count, rank, inputs, gelu):
    # One row's gradient is made of eight rounded numbers: what it is off by says little, the mean over many rows does.
    ours, autocasts = [], []
    for _ in range(draws):
        model = adapted(inputs, rank=rank)
        x, dy = torch.randn(rows, inputs), torch.randn(rows, 96 * count)
        half = HalfLora(layers(model, count))
        assert fits(half.layers)
        found = results(model, count, x, dy, lambda _, x, half=half: half_lora(x, half, gelu))
        plain = results(model, count, x, dy, under_autocast(by_peft), gelu)
        exact = results(copy.deepcopy(model).double(), count, x.double(), dy.double(), by_peft, gelu)
        ours.append([error(one, wanted) for one, wanted in zip(found, exact, strict=True)])
        autocasts.append([error(one, wanted) for one, wanted in zip(plain, exact, strict=True)])
    assert torch.all(torch.tensor(ours).mean(0) <= 1.2 * torch.tensor(autocasts).mean(0))
    assert found[0].dtype == HALF and all(g.dtype == torch.float32 for g in found[1:])


def test_it_follows_an_optimizer_a_copy_and_memory_put_in_place():
    model = adapted()
    half, x = HalfLora(layers(model, 3)), torch.randn(9, 64)
    parts = [*(p.lora_A.default.weight for p in half.layers), *(p.lora_B.default.weight for p in half.layers)]
    optimizer = torch.optim.AdamW(parts, lr=0.1, fused=True)

    def stepped() -> None:
        half_lora(x, half).square().sum().backward()
        clipped_step(optimizer, torch.tensor(1.0), 1.0)

    changes = [
        stepped,
        lambda: [part.copy_(part * 0.5) for part in parts],
        lambda: [setattr(part, "data", part.data + 0.05) for part in parts],
        lambda: half.layers[1].base_layer.weight.mul_(2.0),
        lambda: setattr(half.layers[2].lora_B, "default", nn.Linear(8, 96, bias=False)),
    ]
    before = half_lora(x, half).detach()
    for change in changes:
        with torch.set_grad_enabled(change is stepped):
            change()
        now = half_lora(x, half).detach()
        assert not torch.equal(now, before)
        wanted = under_autocast(by_peft)(half.layers, x).detach()
        assert (now - wanted).abs().max() <= 2**-6 * wanted.abs().max()
        before = now


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"rank_pattern": {"key": 4}}], ids=str)
def test_what_is_not_one_plain_pair_of_one_kind_is_left_to_peft(options):
    assert not fits(layers(adapted(**options), 3))


def pair(folder) -> tuple[RunningModel, RunningModel]:
    """The same adapted model twice: under plain autocast, and bound."""
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
            assert bind_half_weights(running) and bind_half_lora(running) == 13  # six of each layer, and the pooler
        both.append(running.eval())
    return both[0], both[1]


def logits(running: RunningModel, *, half: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    batch = pack([torch.randint(5, 60, (n,), generator=generator).numpy() for n in (3, 17, 1, 9)])
    with torch.autocast("cpu", HALF, enabled=half):
        return running(batch).float()


def gradients(running: RunningModel, *, half: bool = True) -> dict[str, Tensor]:
    running.zero_grad(set_to_none=True)
    logits(running, half=half).square().sum().backward()
    return {n: p.grad for n, p in running.model.named_parameters() if p.grad is not None}


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 2**-5 * wanted.abs().max() + 1e-6)


def test_a_bound_model_gives_the_logits_and_gradients_of_autocast(tiny_model):
    plain, bound = pair(tiny_model)
    assert close(logits(bound), logits(plain))
    ours, theirs, exact = gradients(bound), gradients(plain), gradients(plain, half=False)
    assert ours.keys() == theirs.keys() and len(theirs) > 20
    for name, wanted in exact.items():
        assert error(ours[name], wanted) <= 2 * error(theirs[name], wanted) + 2e-3, name
    layer = bound.model.base_model.encoder.layer[0]
    calls = [layer.attention.self, layer.intermediate, layer.output.dense]
    assert all("forward" in vars(module) for module in calls)


def test_adapters_that_are_merged_changed_or_switched_off_are_followed(tiny_model):
    plain, bound = pair(tiny_model)

    def each(change) -> None:
        for running in (plain, bound):
            for module in running.model.modules():
                if isinstance(module, BaseTunerLayer) and hasattr(module, "lora_A"):
                    change(module)

    def grow(module) -> None:
        with torch.no_grad():
            module.lora_B.default.weight.mul_(1.5)

    seen = [logits(bound)]
    for change, differs in (
        (lambda m: m.merge(), False),
        (lambda m: m.unmerge(), False),
        (grow, True),
        (lambda m: m.merge(), False),
        (lambda m: m.unmerge(), False),
        (lambda m: m.enable_adapters(False), True),
    ):
        each(change)
        seen.append(logits(bound))
        assert close(seen[-1], logits(plain))
        assert differs == (not close(seen[-1], seen[-2]))
