"""bf16 weights beside fp32 ones give autocast's numbers, follow every change, and are seen by nobody else."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from regraft.engine.half_weights import bind_half_weights
from regraft.engine.models import RunningModel
from regraft.engine.packing import pack
from regraft.engine.training.optimizer import clipped_step
from regraft.kernels import linear_native


def pair(folder, *, kernels: bool = True) -> tuple[RunningModel, RunningModel]:
    """The same model twice: under plain autocast, and with bf16 weights held."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    for weight in model.parameters():
        if weight.dim() > 1:  # larger than the usual start, so that mistakes show
            torch.nn.init.normal_(weight, std=0.2)
    both = []
    for half in (False, True):
        running = RunningModel(copy.deepcopy(model), pad_token_id=0)
        running.run_packed()
        if kernels:
            running.use_kernels()
        if half:
            assert bind_half_weights(running) > 0
            layers = running.model.base_model.encoder.layer
            assert all("forward" in vars(layer.intermediate) for layer in layers)  # with GELU
        both.append(running.eval())  # without dropout
    return both[0], both[1]


def batch():
    generator = torch.Generator().manual_seed(2)
    return pack([torch.randint(5, 60, (n,), generator=generator).numpy() for n in (3, 17, 1, 9)])


def logits(running: RunningModel) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return running(batch()).float()


def gradients(running: RunningModel) -> dict[str, torch.Tensor]:
    running.zero_grad(set_to_none=True)
    logits(running).square().sum().backward()
    return {n: p.grad for n, p in running.model.named_parameters() if p.grad is not None}


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    # two roundings to 8 bits, at the scale of the largest value
    return bool((found - wanted).abs().max() <= 2**-7 * wanted.abs().max() + 1e-6)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("tiled", [True, False])
def test_logits_and_gradients_are_those_of_autocast(tiny_model, kernels, tiled, monkeypatch):
    if not tiled:  # as on a processor that has none
        monkeypatch.setattr(linear_native, "runs_here", lambda weight: False)
    plain, half = pair(tiny_model, kernels=kernels)
    assert close(logits(half), logits(plain))
    ours, theirs = gradients(half), gradients(plain)
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert ours[name].dtype == torch.float32
        assert close(ours[name], wanted), name


def test_it_follows_an_optimizer_a_copy_and_memory_put_in_place(tiny_model):
    plain, half = pair(tiny_model)
    changes = [
        lambda model, optimizer: clipped_step(optimizer, torch.tensor(2.0), 1.0),
        lambda model, _: [p.copy_(p * 0.5) for p in model.parameters()],
        lambda model, _: [setattr(p, "data", p.data + 0.05) for p in model.parameters()],
    ]
    optimizers = {id(r): torch.optim.AdamW(r.parameters(), lr=0.05, fused=True) for r in (plain, half)}
    for change in changes:
        before = logits(half)
        for running in (plain, half):
            gradients(running)
            for p, q in zip(running.parameters(), plain.parameters(), strict=True):
                p.grad = q.grad.clone()  # the same step for both
            with torch.no_grad():
                change(running.model, optimizers[id(running)])
        assert not torch.equal(logits(half), before)
        assert close(logits(half), logits(plain))


def test_parameters_state_dict_and_a_frozen_weight_never_notice(tiny_model):
    plain, half = pair(tiny_model)
    ours, theirs = half.model.state_dict(), plain.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == torch.float32 for k in theirs)
    frozen = half.model.base_model.encoder.layer[0]
    for weight in frozen.parameters():
        weight.requires_grad_(False)
    found = gradients(half)
    assert found and not any(".layer.0." in name for name in found)


@pytest.mark.parametrize("tiled", [True, False])
def test_biases_alone_have_the_gradients_that_they_have_among_all(tiny_model, tiled, monkeypatch):
    if not tiled:
        monkeypatch.setattr(linear_native, "runs_here", lambda weight: False)
    _, half = pair(tiny_model)
    among_all = gradients(half)
    for name, weight in half.model.named_parameters():
        weight.requires_grad_(name.endswith(".bias"))
    alone = gradients(half)
    assert alone and alone.keys() < among_all.keys()
    for name, found in alone.items():
        # summed in another order
        torch.testing.assert_close(found, among_all[name], rtol=1e-4, atol=1e-5 * float(found.abs().max()), msg=name)


def test_no_rows_are_no_rows(tiny_model):
    _, half = pair(tiny_model)
    layer = half.model.base_model.encoder.layer[0].intermediate
    x = torch.zeros(2, 0, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.shape == (2, 0, 64)
    out.sum().backward()
    assert x.grad.shape == x.shape and not layer.dense.weight.grad.any()


def test_whoever_listens_to_a_part_is_called(tiny_model):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    heard = []
    model.base_model.encoder.layer[1].intermediate.dense.register_forward_hook(lambda *_: heard.append(1))
    running = RunningModel(model, pad_token_id=0)
    running.run_packed()
    bind_half_weights(running)
    heard.clear()  # packed running was proven
    logits(running.eval())
    assert heard == [1]


def test_without_autocast_products_are_in_fp32(tiny_model):
    plain, half = pair(tiny_model)
    assert torch.equal(half(batch()), plain(batch()))


def test_padded_running_takes_them_off_again(tiny_model):
    _, half = pair(tiny_model)
    half.run_padded("to see")
    assert not any("forward" in vars(m) for m in half.model.modules())


def test_a_run_in_bf16_on_a_cpu_holds_them(make_config, tmp_path, monkeypatch, any_precision):
    from regraft.engine.config import load_config
    from regraft.engine.methods import speed
    from regraft.engine.training import run

    counts = []
    bind = speed.bind_half_weights
    monkeypatch.setattr(speed, "bind_half_weights", lambda running: counts.append(bind(running)) or counts[-1])
    losses: dict[str, list[float]] = {}
    for kernels in ("auto", "off"):
        training = {"max_steps": 4, "batch_size": 8, "learning_rate": 3e-3, "precision": "bf16"}
        model = {"kernels": kernels, "packing": "auto", "dropout": 0.0}
        path = make_config(f"{kernels}.yaml", run=str(tmp_path / kernels), training=training, model=model)
        found = losses[kernels] = []
        run.train(load_config(path), on_step=lambda info, to=found: to.append(info.loss), quiet=True)
    assert len(counts) == 1 and counts[0] > 10
    assert losses["auto"] == pytest.approx(losses["off"], rel=0.02)
