"""Optimizer steps that take turns: each is of one task, and is that task's own step with a weight on its loss.

So a task's loss is what it is in a run of its own, whatever its rows weigh; rows of different kinds never meet in a
batch; and heads that are not concerned are left as they are, their moments and their decay too. A gradient that
a given weight makes larger or smaller is clipped to that much more or less: else clipping would take the weight back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from regraft.engine.several.model import ManyHeads, Pick
from regraft.engine.tasks import Task
from regraft.engine.training.step import Stepper

if TYPE_CHECKING:
    from regraft.engine.examples import Examples


@dataclass(frozen=True)
class Turn:
    """What a `Stepper` asks of a task, for one of several.

    `log_variance` s: the loss is then exp(-s) L + s / 2, for a regression exp(-s) L / 2 + s / 2, and s is learned (Kendall
    et al. 2018, s = log sigma^2).
    """

    task: Task
    pick: Pick
    weight: float = 1.0
    log_variance: Tensor | None = None

    def draw(self, examples: Examples, units: np.ndarray, seed: Sequence[int]) -> tuple[Examples, np.ndarray]:
        return self.task.draw(examples, units, seed)

    def targets_of(self, examples: Examples, sequences: np.ndarray) -> np.ndarray:
        return self.task.targets_of(examples, sequences)

    def batch_loss(self, logits: Any, targets: Tensor, weights: Tensor, lengths: Sequence[int]) -> Tensor:
        loss = self.task.batch_loss(self.pick(logits, lengths), targets, weights, lengths)
        if self.log_variance is None:
            return loss * self.weight
        share = 0.5 if self.task.type == "regression" else 1.0
        s = self.log_variance.squeeze()
        return torch.exp(-s) * loss * share + 0.5 * s * weights.sum()


@dataclass
class TurnStepper(Stepper):
    """A `Stepper` over `MixedExamples`, whose task is `Several` and whose every step has rows of one task."""

    def __post_init__(self) -> None:
        several: Any = self.task
        model: ManyHeads = self.accelerator.unwrap_model(self.model).model
        shared = {f.name: getattr(self, f.name) for f in fields(Stepper)}
        self.turns: dict[str, Stepper] = {}
        self.others: dict[str, list[Tensor]] = {}
        for number, name in enumerate(several.tasks):
            variance = None if model.log_variances is None else model.log_variances[number]
            turn = Turn(several.tasks[name], Pick.of(several, name), several.loss_weights.get(name, 1.0), variance)
            part = self.examples.parts[name]  # type: ignore[attr-defined]
            self.turns[name] = Stepper(**shared | {"task": turn, "examples": part})
            self.others[name] = _of_others(model, number)

    def _gradients(self, step: int, rows: np.ndarray) -> Tensor:
        name, units = self.examples.turn(rows)  # type: ignore[attr-defined]
        turn = self.turns[name]
        turn.token_budget = self.token_budget
        loss = turn._gradients(step, units)
        if turn.max_grad_norm is not None:
            self.max_grad_norm = turn.max_grad_norm * turn.task.weight  # type: ignore[attr-defined]
        for parameter in self.others[name]:
            parameter.grad = None  # 0 so far, by which moments would decay and weights go on moving
        return loss


def _of_others(model: ManyHeads, number: int) -> list[Tensor]:
    """Parameters of every head but one, and what weighs their losses."""
    found: list[Tensor] = []
    for other, head in enumerate(model.heads):
        if other != number:
            found += head.parameters()
            found += [] if model.log_variances is None else [model.log_variances[other]]
    return found
