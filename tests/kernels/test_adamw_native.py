"""AdamW and the gradients' norm in C: against fp64 as torch's fused one is, their bits, copies in bf16, torch's own state."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from regraft.engine import half_weights
from regraft.engine.half_weights import HalfWeights
from regraft.engine.products import linear
from regraft.engine.training import optimizer as training
from regraft.engine.training.optimizer import clipped_step, gradient_norm
from regraft.kernels import adamw_native, native
from regraft.kernels.choice import forced
from regraft.kernels.embedding import RowGradient

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler, or torch without GNU OpenMP")

SIZES = [(1,), (7,), (97,), (1025,), (70000,), (5, 3, 11), (16384,), (32769,)]
RATES, DECAYS = (1e-3, 3e-2, 0.5), (0.0, 0.1, 0.01)
BETAS, EPS = (0.9, 0.98), 1e-6


def weights_of(values: list[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(v.float()) for v in values]


def fused(weights: list[nn.Parameter]) -> torch.optim.AdamW:
    """Three groups, each with its own learning rate and decay."""
    parts = zip(RATES, DECAYS, strict=True)
    groups = [{"params": weights[i::3], "lr": lr, "weight_decay": decay} for i, (lr, decay) in enumerate(parts)]
    return torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True)


def step(
    weights: list[nn.Parameter], optimizer: torch.optim.AdamW, gradients: list[Tensor], max_norm: float | None
) -> None:
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.float()
    clipped_step(optimizer, gradient_norm(weights), max_norm)


def in_fp64(values: list[Tensor], steps: list[list[Tensor]], max_norm: float) -> list[Tensor]:
    """Loshchilov and Hutter's algorithm 2, as torch.optim.AdamW documents it."""
    p = [v.float().double() for v in values]
    m, v = [[torch.zeros_like(x) for x in p] for _ in range(2)]
    for t, gradients in enumerate(steps, 1):
        exact = [g.float().double() for g in gradients]
        scale = max(1.0, float(torch.cat([g.flatten() for g in exact]).norm()) / max_norm)
        for i, gradient in enumerate(exact):
            lr, decay, g = RATES[i % 3], DECAYS[i % 3], gradient / scale
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * g
            v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * g * g
            p[i] = p[i] * (1 - lr * decay)
            p[i] -= lr / (1 - BETAS[0] ** t) * m[i] / ((v[i] / (1 - BETAS[1] ** t)).sqrt() + EPS)
    return p


def problem(steps: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Weights and the gradients of some steps: large, so that they are clipped, and near eps, where its place matters."""
    values = [torch.randn(s, dtype=torch.float64) for s in SIZES]
    scales = (1.0, 1e-5, 30.0, 1e-6)
    return values, [
        [torch.randn(s, dtype=torch.float64) * scales[(n + i) % 4] for i, s in enumerate(SIZES)] for n in range(steps)
    ]


@pytest.fixture
def counted(monkeypatch):
    """How many updates were computed in C."""
    calls = []
    ours = adamw_native.adamw
    monkeypatch.setattr(adamw_native, "adamw", lambda *given: calls.append(1) or ours(*given))
    return calls


@pytest.mark.parametrize("max_norm", [1.0, 1e9], ids=["clipped", "as they are"])
def test_steps_are_as_near_to_fp64_as_torchs_fused_ones(max_norm, counted):
    values, steps = problem(6)
    exact = in_fp64(values, steps, max_norm)
    found = {}
    for form in ("reference", "auto"):
        weights = found[form] = weights_of(values)
        optimizer = fused(weights)
        with forced(form):
            for gradients in steps:
                step(weights, optimizer, gradients, max_norm)
    assert len(counted) == 6
    for ours, theirs, wanted in zip(found["auto"], found["reference"], exact, strict=True):
        error, allowed = ((x.detach().double() - wanted).abs().max() for x in (ours, theirs))
        # a number or two may happen to come out exactly
        assert error <= 2 * allowed + 2**-23 * wanted.abs().max()


def test_each_step_raises_the_weights_version_and_leaves_the_gradients():
    values, (gradients,) = problem(1)
    weights = weights_of(values)
    before = [w._version for w in weights]
    step(weights, fused(weights), gradients, 1.0)
    assert all(w._version > b for w, b in zip(weights, before, strict=True))
    assert all(torch.equal(w.grad, g.float()) for w, g in zip(weights, gradients, strict=True))


def test_the_same_bits_whatever_the_number_of_threads():
    values, steps = problem(3)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            weights = weights_of(values)
            optimizer = fused(weights)
            norms = []
            for gradients in steps:
                step(weights, optimizer, gradients, 1.0)
                norms.append(gradient_norm(weights))
            moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
            found.append([*weights, *moments, *norms])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_copies_in_bf16_are_the_new_weights_rounded_and_nothing_beside_them():
    updates, halves = [], []
    for size in (1, 7, 97, 1025, 70000):
        p, g, m, v = torch.randn(size), torch.randn(size), torch.zeros(size), torch.zeros(size)
        room = torch.full((size + 16,), 3.0, dtype=torch.bfloat16)
        updates.append(adamw_native.Update(p, g, m, v, torch.zeros(()), 0.1, 0.1, BETAS, EPS))
        halves.append(room[8:-8])
        p[-1] = float("nan") if size == 97 else 1.0
    for _ in range(2):
        adamw_native.adamw(updates, 1.5, halves)
        for u, half in zip(updates, halves, strict=True):
            assert torch.equal(half.nan_to_num(), u.weight.bfloat16().nan_to_num())
            assert torch.equal(half.isnan(), u.weight.isnan())
            room = torch.as_strided(half, (len(u.weight) + 16,), (1,), 0)
            assert (room[:8] == 3.0).all() and (room[-8:] == 3.0).all()
    # what lies half way between two bf16 numbers goes to the even one: without a rate, weights stay as they are
    ties = torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, -1.0 - 2**-8] * 5)
    zero, half = [torch.zeros(15) for _ in range(3)], torch.empty(15, dtype=torch.bfloat16)
    adamw_native.adamw([adamw_native.Update(ties, *zero, torch.zeros(()), 0.0, 0.0, BETAS, EPS)], halves=[half])
    assert torch.equal(half, ties.bfloat16()) and half[0] != half[1] and half[0] == 1.0


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_norm_is_as_near_to_fp64_as_torchs(scale):
    values = [torch.randn(s) * scale for s in [*SIZES, (0,), (300000,)]]
    weights = [nn.Parameter(torch.empty_like(v)) for v in values]
    for weight, value in zip(weights, values, strict=True):
        weight.grad = value
    exact = float(torch.cat([v.flatten().double() for v in values]).norm())
    ours = float(gradient_norm(weights))
    with forced("reference"):
        theirs = float(gradient_norm(weights))
    assert abs(ours - exact) <= 2 * abs(theirs - exact) + 2**-23 * exact
    alone = [float(adamw_native.square_sum([v])) for v in values]
    assert alone == pytest.approx([float(v.double().square().sum()) for v in values], rel=1e-6)


def test_norm_reads_of_an_embedding_the_rows_that_were_touched():
    weight, other = nn.Parameter(torch.randn(50, 8)), nn.Parameter(torch.randn(3))
    rows = RowGradient(weight)
    rows.add(torch.tensor([3, 7, 3]), torch.randn(3, 8))
    other.grad = torch.randn(3)
    dense = gradient_norm([weight, other])
    assert float(gradient_norm([weight, other], rows)) == pytest.approx(float(dense), rel=1e-6)
    rows.buffer[20] = 1e6  # not among the rows that are read
    assert float(gradient_norm([weight, other], rows)) == pytest.approx(float(dense), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e25])
@pytest.mark.parametrize("place", [0, 69999])
def test_a_gradient_that_is_not_finite_shows_in_the_norm_as_before(bad, place):
    weight = nn.Parameter(torch.zeros(70000))
    weight.grad = torch.randn(70000)
    weight.grad[place] = bad
    ours = gradient_norm([weight])
    with forced("reference"):
        theirs = gradient_norm([weight])
    assert not torch.isfinite(ours) and torch.equal(ours.nan_to_num(3.0), theirs.nan_to_num(3.0))


@pytest.mark.parametrize("first, then", [("auto", "reference"), ("reference", "auto")])
def test_a_run_continues_the_other_ways_state(first, then, counted):
    values, steps = problem(4)
    ends = []
    for forms in ([first, then], [first, first]):
        weights = weights_of(values)
        optimizer = fused(weights)
        for half, form in zip((steps[:2], steps[2:]), forms, strict=True):
            with forced(form):
                for gradients in half:
                    step(weights, optimizer, gradients, 1.0)
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = fused(weights)  # as a resumed run has it
            optimizer.load_state_dict(state)
        ends.append((weights, state))
    assert counted
    for one, other in zip(ends[0][0], ends[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    mixed, pure = (s["state"] for _, s in ends)
    assert mixed.keys() == pure.keys()
    for key, state in mixed.items():
        assert list(state) == list(pure[key]) == ["step", "exp_avg", "exp_avg_sq"]
        assert float(state["step"]) == 4.0 and state["step"].dtype == pure[key]["step"].dtype
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[name], pure[key][name], rtol=1e-5, atol=1e-9)


def test_a_weight_without_a_gradient_stays_and_gets_no_state(counted):
    weights = weights_of([torch.randn(9), torch.randn(9)])
    optimizer = torch.optim.AdamW(weights, fused=True)
    still = weights[1].detach().clone()
    weights[0].grad = torch.randn(9)
    clipped_step(optimizer, gradient_norm(weights), 1.0)
    assert counted and torch.equal(weights[1], still) and list(optimizer.state) == [weights[0]]


def hooked(optimizer: torch.optim.AdamW) -> torch.optim.AdamW:
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, fused=True, amsgrad=True),
        lambda p: torch.optim.AdamW(p, fused=True, maximize=True),
        lambda p: torch.optim.AdamW(p, fused=True, lr=torch.tensor(0.1)),
        lambda p: torch.optim.AdamW(p, foreach=True),
        lambda p: torch.optim.AdamW(p),
        lambda p: torch.optim.Adam(p, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: hooked(torch.optim.AdamW(p, fused=True)),
    ],
    ids=["amsgrad", "maximize", "tensor lr", "foreach", "loop", "adam", "sgd", "hooked"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_it_does_not_compute_is_left_to_torch(make, dtype, counted):
    weight = nn.Parameter(torch.randn(33, dtype=dtype))
    before, optimizer = weight.detach().clone(), make([weight])
    weight.grad = torch.randn(33, dtype=dtype)
    clipped_step(optimizer, gradient_norm([weight]), None)
    assert not counted and not torch.equal(weight, before)


def test_a_hook_of_every_optimizer_is_for_torch_to_run(counted):
    weight, seen = nn.Parameter(torch.randn(33)), []
    weight.grad = torch.randn(33)
    handle = register_optimizer_step_pre_hook(lambda *_: seen.append(1))
    try:
        clipped_step(torch.optim.AdamW([weight], fused=True), gradient_norm([weight]), None)
    finally:
        handle.remove()
    assert seen and not counted


def test_weights_that_are_not_contiguous_are_left_to_torch(counted):
    weight = nn.Parameter(torch.randn(8, 6).t())
    weight.grad = torch.randn(8, 6).t()
    clipped_step(torch.optim.AdamW([weight], fused=True), gradient_norm([weight]), None)
    assert not counted


@pytest.fixture
def casts(monkeypatch):
    """How many times a bf16 copy was cast."""
    calls = []
    beside = half_weights._beside
    monkeypatch.setattr(half_weights, "_beside", lambda *given: calls.append(1) or beside(*given))
    return calls


def layers_and_optimizer() -> tuple[list[nn.Linear], HalfWeights, torch.optim.AdamW]:
    """Three layers merged, the second without a bias, as an optimizer and a product see them."""
    layers = [nn.Linear(33, 5), nn.Linear(33, 7, bias=False), nn.Linear(33, 1)]
    half = HalfWeights(layers)
    return layers, half, torch.optim.AdamW([p for layer in layers for p in layer.parameters()], lr=0.1, fused=True)


def learn(layers: list[nn.Linear], optimizer: torch.optim.AdamW) -> None:
    weights = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    clipped_step(optimizer, gradient_norm(weights), 1.0)


def is_fresh(half: HalfWeights) -> bool:
    weight, bias = half.current()
    biases = [layer.bias for layer in half.layers if layer.bias is not None]
    wanted = torch.cat([layer.weight for layer in half.layers]).bfloat16(), torch.cat(biases).bfloat16()
    return torch.equal(weight, wanted[0]) and torch.equal(bias, wanted[1])


def test_after_a_step_the_copy_is_the_weights_and_was_not_cast(casts):
    layers, half, optimizer = layers_and_optimizer()
    learn(layers, optimizer)  # before the first cast there is nothing to write
    assert is_fresh(half) and len(casts) == 2
    for _ in range(3):
        before = half.current()[0].clone()
        learn(layers, optimizer)
        assert is_fresh(half) and not torch.equal(half.current()[0], before)
    assert len(casts) == 2
    with forced("reference"):
        learn(layers, optimizer)
    assert is_fresh(half) and len(casts) == 4


def test_other_changes_are_noticed_before_and_after_a_step(casts):
    layers, half, optimizer = layers_and_optimizer()
    averaged = training.AveragedWeights([p for layer in layers for p in layer.parameters()], 0.5)
    changes = [
        averaged.swap,
        lambda: layers[1].load_state_dict({"weight": torch.randn(7, 33)}),
        lambda: setattr(layers[2].weight, "data", torch.randn(1, 33)),
        lambda: setattr(layers[2], "weight", nn.Parameter(torch.randn(1, 33))),
    ]
    for change in changes:
        assert is_fresh(half)
        change()
        count = len(casts)
        assert is_fresh(half) and len(casts) == count + 2
        change()
        learn(layers, optimizer)  # the copy is out of date, and only some of its weights may be in the optimizer
        assert is_fresh(half)
        learn(layers, optimizer)
        assert is_fresh(half)


def test_a_layer_frozen_beside_trained_ones_keeps_its_copy(casts):
    layers, half, _ = layers_and_optimizer()
    layers[1].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for x in layers for p in x.parameters() if p.requires_grad], lr=0.1, fused=True)
    half.current()
    count = len(casts)
    learn(layers, optimizer)
    assert is_fresh(half) and len(casts) == count


def test_two_copies_of_one_weight_are_both_right():
    layers, half, optimizer = layers_and_optimizer()
    other = HalfWeights(layers[:1])
    for _ in range(2):
        assert is_fresh(half) and is_fresh(other)
        learn(layers, optimizer)
    assert is_fresh(half) and is_fresh(other)


def test_a_copied_model_does_not_take_the_others_copy():
    layers, half, optimizer = layers_and_optimizer()
    half.current()
    twin = copy.deepcopy(half)
    learn(layers, optimizer)
    assert is_fresh(half) and is_fresh(twin)
    assert not torch.equal(half.current()[0], twin.current()[0])


def test_writing_a_copy_that_a_backward_pass_still_needs_is_refused():
    layers, _, optimizer = layers_and_optimizer()
    half = HalfWeights(layers[:1])
    x = torch.randn(16, 33, requires_grad=True)
    out = linear(x, half)
    learn(layers, optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_copies_do_not_keep_a_model_alive():
    layers, half, optimizer = layers_and_optimizer()
    half.current()
    learn(layers, optimizer)
    count = len(half_weights._alive)
    del layers, half, optimizer
    gc.collect()
    assert len(half_weights._alive) < count
