"""How steps are computed is found by trial on a GPU; the trial itself, and torch.compile's way, run here."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForSequenceClassification

from regraft.engine.config import load_config
from regraft.engine.data.rows import Rows
from regraft.engine.data.tokens import TokenStore
from regraft.engine.examples import Examples
from regraft.engine.fast_gpu import bind_fused
from regraft.engine.models import RunningModel
from regraft.engine.tasks.classification import Classification
from regraft.engine.training import ways
from regraft.engine.training.graphed import GraphedGradients
from regraft.engine.training.graphed_losses import step_loss
from regraft.engine.training.step import Stepper
from regraft.engine.training.ways import capture_update, try_ways

LENGTHS = np.array([9, 4, 30, 5, 5, 12, 20, 3, 7, 7, 16, 11])
STEPS = [(0, np.arange(6)), (1, np.arange(6, 12))]


@pytest.fixture
def stepper(tiny_model) -> Stepper:
    torch.manual_seed(0)
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3, **options)
    running = RunningModel(model, pad_token_id=0)
    running.run_packed()
    running.use_kernels()
    assert bind_fused(running)
    generator = np.random.default_rng(3)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    store = TokenStore(generator.integers(5, 60, offsets[-1]).astype(np.int32), offsets)
    task = Classification(("a", "b", "c"))
    targets = generator.integers(0, 3, len(LENGTHS))
    rows = Rows("train", "train.csv", [""] * len(LENGTHS), None, np.arange(len(LENGTHS)))
    parameters = list(running.train().parameters())
    # a large epsilon: gradients that are rounding alone, as of a key's bias, must not become whole steps
    return Stepper(
        accelerator=Accelerator(cpu=True), model=running, optimizer=torch.optim.AdamW(parameters, lr=1e-3, eps=1e-2, fused=True),
        parameters=parameters, task=task, examples=Examples(rows, store, targets, task.weights(targets)), seed=0,
        token_budget=50, max_grad_norm=1.0,
    )  # fmt: skip


def uncaptured(stepper: Stepper, compiled: str | None = None) -> GraphedGradients:
    loss = step_loss(stepper.task)
    return GraphedGradients(stepper.model, loss, stepper.parameters, capture=False, compiled=compiled)


def clock(*seconds: float):
    left = list(seconds)
    return lambda stepper, steps: left.pop(0)


def test_the_fastest_way_is_taken_and_the_log_says_what_was_found(stepper):
    makers = {"filled": lambda: uncaptured(stepper), "eager": lambda: None, "other": lambda: uncaptured(stepper)}
    trial = try_ways(stepper, makers, STEPS, whole=10, measure=clock(0.003, 0.002, 0.0015))
    assert trial.chosen == "other" and isinstance(stepper.graphed, GraphedGradients)
    assert trial.line() == "steps by other; forward and backward: other 1.50 ms, eager 2.00 ms, filled 3.00 ms"
    trial = try_ways(stepper, makers, STEPS, whole=10, measure=clock(0.003, 0.001, 0.002))
    assert trial.chosen == "eager" and stepper.graphed is None


def test_compiling_is_tried_only_where_a_run_is_long_enough_to_earn_it_back(stepper):
    made = []
    makers = {"eager": lambda: None, "compiled": lambda: made.append(1) or uncaptured(stepper)}
    trial = try_ways(stepper, makers, STEPS, whole=1000, measure=clock(0.5, 0.1))
    assert trial.chosen == "eager" and not made
    assert "compiled left out (the whole run takes about 500 s)" in trial.line()
    assert try_ways(stepper, makers, STEPS, whole=10_000, measure=clock(0.5, 0.1)).chosen == "compiled"


def test_a_way_that_fails_is_left_out_with_its_reason(stepper):
    def broken() -> GraphedGradients:
        raise RuntimeError("no kernel for this\nand more")

    def not_captured() -> GraphedGradients:
        way = uncaptured(stepper)
        way.reason = "operation not permitted when stream is capturing"
        return way

    makers = {"graphs": not_captured, "eager": lambda: None, "compiled": broken}
    trial = try_ways(stepper, makers, STEPS, whole=10**9, measure=clock(0.001, 0.002))
    assert trial.chosen == "eager" and stepper.graphed is None
    assert trial.left_out == {
        "graphs": "operation not permitted when stream is capturing",
        "compiled": "RuntimeError: no kernel for this",
    }


def test_a_trial_changes_neither_weights_nor_gradients_nor_random_numbers(stepper):
    before = [p.detach().clone() for p in stepper.parameters]
    torch.manual_seed(5)
    random = torch.get_rng_state()
    trial = try_ways(stepper, {"filled": lambda: uncaptured(stepper), "eager": lambda: None}, STEPS, whole=10)
    assert set(trial.seconds) == {"filled", "eager"} and all(s > 0 for s in trial.seconds.values())
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, stepper.parameters, strict=True))
    assert all(p.grad is None for p in stepper.parameters)
    assert not stepper.optimizer.state


def test_every_way_gives_the_same_gradients(stepper):
    def gradients(way) -> list[torch.Tensor]:
        stepper.graphed = way
        stepper.clear()
        for step, rows in STEPS:
            stepper.gradients(step, rows)
        return [p.grad.clone() for p in stepper.parameters]

    eager = gradients(None)
    assert max(float(g.abs().max()) for g in eager) > 1e-3
    for way in (uncaptured(stepper), uncaptured(stepper, compiled="eager")):
        for found, wanted in zip(gradients(way), eager, strict=True):
            assert torch.allclose(found, wanted, atol=1e-6)
    torch.compiler.reset()


def test_what_cannot_be_compiled_runs_uncompiled_and_says_so(stepper, caplog):
    def refuses(*_):
        raise NotImplementedError("this backend takes nothing")

    way = uncaptured(stepper)
    way._lost = refuses
    stepper.graphed = way
    loss = float(stepper.gradients(0, STEPS[0][1]))
    stepper.graphed = None
    stepper.clear()
    assert loss == pytest.approx(float(stepper.gradients(0, STEPS[0][1])), rel=1e-5)
    assert caplog.messages == ["steps run uncompiled: NotImplementedError"]


def test_batches_made_ahead_are_those_of_the_step_and_cut_anew_when_memory_grows_short(stepper):
    stepper.graphed = uncaptured(stepper)
    capture_update(stepper, capture=False)
    start = [p.detach().clone() for p in stepper.parameters]
    ends = []
    for ahead, budget in ((False, 50), (True, 50), (True, 20)):
        with torch.no_grad():
            for p, w in zip(stepper.parameters, start, strict=True):
                p.copy_(w)
        stepper.optimizer.state.clear()
        stepper.token_budget = 50
        stepper(0, STEPS[0][1], STEPS[1][1] if ahead else None)
        stepper.token_budget = budget
        result = stepper(1, STEPS[1][1])
        assert result.applied and result.tokens == int(LENGTHS[6:].sum())
        ends.append((result.loss, [p.detach().clone() for p in stepper.parameters]))
    assert ends[0][0] == ends[1][0] == pytest.approx(ends[2][0], rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ends[0][1], ends[2][1], strict=True))


@pytest.mark.parametrize(
    "wanted, said", [("graphs", ["steps run without CUDA graphs: the model is on cpu"]), ("auto", [])]
)
def test_on_a_cpu_steps_run_as_they_do_and_a_forced_way_says_why_not(stepper, make_config, wanted, said):
    config = load_config(make_config(training={"steps": wanted}))
    lines: list[str] = []
    run = SimpleNamespace(
        config=config, stepper=stepper, accelerator=stepper.accelerator, running=stepper.model, precision="fp32",
        data=SimpleNamespace(task=stepper.task), unfreezing=None, say=lines.append,
    )  # fmt: skip
    ways.set_way(run)
    assert lines == said and stepper.graphed is None and stepper.update is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_learns_the_same_by_every_way(make_config, tmp_path, capfd):
    from regraft.engine.training import run

    losses: dict[str, list[float]] = {}
    for steps in ("eager", "graphs", "auto"):
        training = {"max_steps": 12, "batch_size": 24, "learning_rate": 1e-3, "precision": "fp32", "steps": steps}
        path = make_config(f"{steps}.yaml", run=str(tmp_path / steps), training=training, model={"dropout": 0.0})
        found = losses[steps] = []
        run.train(load_config(path), on_step=lambda info, to=found: to.append(info.loss))
    assert losses["graphs"] == pytest.approx(losses["eager"], rel=1e-2)
    assert losses["auto"] == pytest.approx(losses["eager"], rel=1e-2)
    assert "forward and backward: " in "".join(capfd.readouterr())
