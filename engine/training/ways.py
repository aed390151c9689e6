"""How a run's gradients are computed on a GPU: CUDA graphs, torch.compile, or one kernel after another; by trial.

A few of the run's own steps go forward and backward each way before it starts, and are forgotten again: no weight, no
moment and no later random number changes. The fastest is taken, and the log tells what was found. Compiling takes a
minute or two, so it is tried only where the run is long enough to earn that back. `training.steps` forces one way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from regraft.engine.training.graphed import GraphedGradients
    from regraft.engine.training.run import _Run
    from regraft.engine.training.step import Stepper

TRIED_STEPS = 3
EARNS_COMPILING = 1200.0  # seconds of a whole run
Steps = Sequence[tuple[int, np.ndarray]]
Makers = Mapping[str, "Callable[[], GraphedGradients | None]"]


@dataclass
class Trial:
    """`seconds`: of a step, by way; `left_out`: why a way was not tried, or failed."""

    seconds: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def chosen(self) -> str:
        return min(self.seconds, key=self.seconds.__getitem__, default="eager")

    def line(self) -> str:
        """What the log says."""
        found = sorted(self.seconds.items(), key=lambda item: item[1])
        told = [f"{name} {1e3 * seconds:.2f} ms" for name, seconds in found]
        told += [f"{name} left out ({why})" for name, why in self.left_out.items()]
        return f"steps by {self.chosen}; forward and backward: {', '.join(told)}"


def set_way(run: _Run) -> None:
    """Choose how the run's stepper computes gradients, and capture its optimizer where gradients stay in place."""
    wanted, stepper = run.config.training.steps, run.stepper
    on_gpu = run.accelerator.device.type == "cuda"
    if wanted == "eager" or (wanted == "auto" and not on_gpu):
        return
    if stepper.shards is not None:  # every layer of a step waits for weights of other processes, which no graph holds
        run.say("steps run without CUDA graphs: the weights are shared out among processes")
        return
    from regraft.engine.training.graphed import why_not_graphed  # brings Triton along

    reason = why_not_graphed(
        run.running,
        precision=run.precision,
        kernels=run.config.model.kernels,
        task=run.data.task,
        unfreezing=run.unfreezing is not None,
    )
    if reason is not None:
        run.say(f"steps run without CUDA graphs: {reason}")
        return
    makers = makers_of(run)
    if wanted != "auto":
        stepper.graphed = makers[wanted]()
        run.say(f"steps by {wanted}, as training.steps says")
    else:
        order = run.plan.order(0)
        count = min(TRIED_STEPS, run.plan.total_steps, run.plan.steps_per_epoch)
        steps = [(step, run.plan.batch(step, order)) for step in range(count)]
        run.say(try_ways(stepper, makers, steps, whole=run.plan.total_steps).line())
    capture_update(stepper)


def makers_of(run: _Run) -> Makers:
    """Each way's gradients, made when they are asked for; None means the stepper's own, one kernel after another."""
    from regraft.engine.training.graphed import GraphedGradients
    from regraft.engine.training.graphed_losses import step_loss

    def graphed(capture: bool, compiled: str | None) -> GraphedGradients:
        loss = step_loss(run.data.task)
        assert not isinstance(loss, str)
        options = {"autocast": run.accelerator.autocast, "capture": capture, "compiled": compiled}
        return GraphedGradients(run.running, loss, run.parameters, **options)

    return {
        "graphs": lambda: graphed(True, None),
        "eager": lambda: None,
        "compiled": lambda: graphed(False, "inductor"),
    }


def try_ways(
    stepper: Stepper,
    makers: Makers,
    steps: Steps,
    *,
    whole: int,
    measure: Callable[[Stepper, Steps], float] | None = None,
) -> Trial:
    """Leave the stepper with the fastest of the ways over `steps`. `whole`: steps of the whole run; `measure`: seconds
    a step, by the clock unless it is given."""
    trial, made = Trial(), {}
    measure = measure or seconds_a_step
    cuda = stepper.accelerator.device.type == "cuda"
    with torch.random.fork_rng(devices=[stepper.accelerator.device] if cuda else []):
        for name, make in makers.items():
            known = min(trial.seconds.values(), default=math.inf) * whole
            if name == "compiled" and known < EARNS_COMPILING:
                trial.left_out[name] = f"the whole run takes about {known:.0f} s"
                continue
            try:
                way = made[name] = stepper.graphed = make()
                seconds = measure(stepper, steps)
            except Exception as error:  # what a compiler or a model of unknown make raises: another way is taken
                trial.left_out[name] = _first_line(error)
            else:
                if name == "graphs" and way is not None and not way.capture:
                    trial.left_out[name] = way.reason
                else:
                    trial.seconds[name] = seconds
            finally:
                stepper.clear()
    stepper.graphed = made.get(trial.chosen)
    for name, way in made.items():
        if way is not None and name != trial.chosen:
            way.forget()
    if "compiled" in made and trial.chosen != "compiled":
        torch._dynamo.reset()
    return trial


def seconds_a_step(stepper: Stepper, steps: Steps) -> float:
    """Seconds of forward and backward of one of the steps, over all processes; each is taken once before it is timed."""

    def take() -> float:
        _wait(stepper)
        began = time.perf_counter()
        for step, rows in steps:
            stepper.gradients(step, rows)
            stepper.clear()
        _wait(stepper)
        return (time.perf_counter() - began) / len(steps)

    take()  # captures, compiles, lets libraries set themselves up
    seconds = torch.tensor(min(take() for _ in range(2)), dtype=torch.float64, device=stepper.accelerator.device)
    if stepper.accelerator.num_processes > 1:  # all must choose the same
        seconds = stepper.accelerator.reduce(seconds, reduction="mean")
    return float(seconds)


def capture_update(stepper: Stepper, *, capture: bool = True) -> None:
    """Clip and update as one graph too, where gradients stay in place and the optimizer can be captured."""
    from regraft.engine.training.captured_optimizer import CapturedOptimizer, can_be_captured

    if stepper.graphed is None or stepper.accelerator.scaler is not None or not can_be_captured(stepper.optimizer):
        return
    stepper.update = CapturedOptimizer(
        stepper.optimizer, stepper.graphed.parameters, stepper.max_grad_norm, capture=capture
    )


def _wait(stepper: Stepper) -> None:
    if stepper.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
