"""The optimizer's step in the form a CUDA graph holds, as far as it runs without one: equal to the engine's own step."""

from __future__ import annotations

import copy

import pytest
import torch

import fake_cuda
from regraft.engine.training.captured_optimizer import CapturedOptimizer, can_be_captured
from regraft.engine.training.optimizer import clipped_step, gradient_norm, set_learning_rate

SHAPES = [(5, 4), (4,), (3, 3), (7,)]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])]


def some(seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for shape in SHAPES]


def made(device: str = "cpu"):
    """Weights in two groups, as the engine groups them, and their optimizer."""
    weights = [w.to(device).requires_grad_() for w in some(0)]
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "lr": 1e-2, "base_lr": 1e-2, "weight_decay": 0.1},
        {"params": [w for w in weights if w.dim() == 1], "lr": 3e-2, "base_lr": 3e-2, "weight_decay": 0.0},
    ]
    for w in weights:
        w.grad = torch.zeros_like(w)
    return weights, torch.optim.AdamW(groups, fused=True)


def give(weights, gradients) -> None:
    for w, g in zip(weights, gradients, strict=True):
        w.grad.copy_(g)


def loss(value: float, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_norm", [1.0, None])
def test_it_takes_the_steps_that_the_engine_takes_otherwise(device, max_norm):
    ours, our_optimizer = made(device)
    theirs, their_optimizer = made(device)
    step = CapturedOptimizer(our_optimizer, ours, max_norm, capture=device == "cuda")
    for number in range(6):
        gradients = some(1 + number, scale=2.0 if number % 2 else 0.05)  # clipped and not
        for weights, optimizer in ((ours, our_optimizer), (theirs, their_optimizer)):
            give(weights, gradients)
            set_learning_rate(optimizer, 1.0 - number / 6)
        step(loss(0.5, device))
        found, norm = step.report()
        expected = gradient_norm(theirs)
        clipped_step(their_optimizer, expected, max_norm)
        assert (found, norm) == (0.5, pytest.approx(float(expected), rel=1e-6))
        assert not any(w.grad.any() for w in ours), "gradients are cleared for the next step"
    assert step.reason == ("" if device == "cuda" else "capturing was not asked for")
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_is_taken(device, wrong):
    weights, optimizer = made(device)
    step = CapturedOptimizer(optimizer, weights, 1.0, capture=device == "cuda")
    for number in range(2):
        give(weights, some(1 + number))
        step(loss(1.0, device))
        assert step.report()[0] == 1.0
    before = [w.detach().clone() for w in weights]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    gradients = some(7)
    if wrong == "gradient":
        gradients[2][0, 0] = float("nan")
    give(weights, gradients)
    step(loss(float("inf") if wrong == "loss" else 1.0, device))
    found = step.report()
    assert not all(torch.isfinite(torch.tensor(found)))
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    for key, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(values[name], state[key][name]) for name in values), "moments and counts stay"
    assert not any(w.grad.any() for w in weights)
    give(weights, some(8))
    step(loss(1.0, device))
    assert all(map(torch.isfinite, torch.tensor(step.report())))
    assert not any(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


def test_what_a_checkpoint_holds_is_what_it_would_hold_without():
    weights, optimizer = made()
    step = CapturedOptimizer(optimizer, weights, 1.0, capture=False)
    plain, plain_optimizer = made()
    for number in range(2):
        give(weights, some(number + 1))
        give(plain, some(number + 1))
        step(loss(1.0))
        clipped_step(plain_optimizer, gradient_norm(plain), 1.0)
    ours, theirs = optimizer.state_dict(), plain_optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    assert {k: v.keys() for k, v in ours["state"].items()} == {k: v.keys() for k, v in theirs["state"].items()}


@pytest.mark.parametrize("device", DEVICES)
def test_a_loaded_state_is_the_one_that_is_gone_on_with(device):
    weights, optimizer = made(device)
    step = CapturedOptimizer(optimizer, weights, 1.0, capture=device == "cuda")
    for number in range(3):
        give(weights, some(number + 1))
        step(loss(1.0, device))
    saved = copy.deepcopy(optimizer.state_dict()), [w.detach().clone() for w in weights]
    ends = []
    for _ in range(2):
        optimizer.load_state_dict(copy.deepcopy(saved[0]))
        with torch.no_grad():
            for w, before in zip(weights, saved[1], strict=True):
                w.copy_(before)
        for number in range(3):
            give(weights, some(number + 11))
            step(loss(1.0, device))
        step.report()
        ends.append([w.detach().clone() for w in weights])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_what_is_no_fused_adamw_is_refused():
    weights, fused = made()
    assert can_be_captured(fused)
    for other in (torch.optim.SGD(weights, 0.1), torch.optim.AdamW(weights, foreach=True)):
        assert not can_be_captured(other)
        with pytest.raises(TypeError, match="expected torch's AdamW with fused=True"):
            CapturedOptimizer(other, weights, 1.0)


def test_a_step_that_cannot_be_captured_is_taken_uncaptured_once(monkeypatch, caplog):
    plain, plain_optimizer = made()
    weights, optimizer = made()
    cuda = fake_cuda.install(monkeypatch)
    taken = optimizer.step
    optimizer.step = lambda: (cuda.sync(), taken())
    step = CapturedOptimizer(optimizer, weights, 1.0)
    for number in range(3):
        give(weights, some(number + 1))
        give(plain, some(number + 1))
        step(loss(1.0))
        clipped_step(plain_optimizer, gradient_norm(plain), 1.0)
    assert "the optimizer runs without a CUDA graph: RuntimeError: operation not permitted" in caplog.text
    assert cuda.current == 0
    cuda.draw()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights, plain, strict=True))
