"""`tasks:` in a configuration: the recipe of training with several heads. Loop, resume and evaluation are the same."""

from __future__ import annotations

import math
from typing import Any

from regraft.engine.several.model import ManyHeads, joined_scale, saved_weights
from regraft.engine.several.plan import MixedPlan
from regraft.engine.several.step import TurnStepper
from regraft.engine.training.order import Plan
from regraft.engine.training.run import _Run
from regraft.engine.training.step import Stepper


class SeveralRun(_Run):
    """One run of several tasks. What differs: whose turn a step is, the heads, and what is told of them."""

    def build(self) -> None:
        super().build()
        scale: Any = joined_scale(self.running.model, self.data.task)  # type: ignore[arg-type]
        self.running.output_scale = scale

    def make_plan(self) -> Plan:
        training, mixing = self.config.training, self.config.mixing
        parts = self.data.splits["train"].parts  # type: ignore[attr-defined]
        return MixedPlan(
            sum(len(part) for part in parts.values()),
            training.batch_size,
            training.seed,
            training.epochs,
            training.max_steps,
            sizes=tuple(len(part) for part in parts.values()),
            exponent=mixing.exponent,
            annealed=mixing.sampling == "annealed",
        )

    def make_stepper(self, **parts: Any) -> Stepper:
        return TurnStepper(**parts)

    def load_best(self) -> None:
        weights = saved_weights(self.folder / "best")
        model = self.running.model
        model.load_state_dict(self.vocabulary.cut(weights) if self.vocabulary else weights, strict=False)
        self.running.output_scale = None  # it is in the saved weights

    def findings(self) -> dict[str, Any]:
        """By task: steps it got, and what its loss weighed, learned or given."""
        model: ManyHeads = self.running.model
        turns = self.plan.taken(self.state.step)
        told = {}
        for number, (name, task) in enumerate(self.config.tasks.items()):
            told[name] = {"steps": int(turns[number]), "weight": task.weight}
            if model.log_variances is not None:
                s = float(model.log_variances[number].detach())
                told[name] |= {"log_variance": s, "weight": math.exp(-s)}
        return {"mixing": told}
