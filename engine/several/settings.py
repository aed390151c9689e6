"""The part of a configuration that several tasks on one encoder have: how they take turns, how their losses weigh."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from regraft.engine.section import Section

if TYPE_CHECKING:
    from regraft.engine.config import RunConfig

METHODS = ("full", "bitfit")
SMALLER_IS_BETTER = ("loss", "mse", "mae", "perplexity")
_NAME = re.compile(r"[A-Za-z][\w-]*")


class MixingConfig(Section):
    """How the tasks of a run share its steps and its loss."""

    sampling: Literal["proportional", "sqrt", "temperature", "annealed"] = Field(
        "proportional",
        description="share of the steps a task gets, by its batches n: n; sqrt(n); n ** (1 / temperature); from n in the "
        "first epoch to n ** 0.2 in the last",
    )
    temperature: float | None = Field(None, ge=1, description="sampling: temperature; 1 is proportional, large is even")
    weighting: Literal["fixed", "uncertainty"] = Field(
        "fixed", description="fixed: each task's weight; uncertainty: learned from how noisy each task is"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> MixingConfig:
        if self.sampling == "temperature" and self.temperature is None:
            raise ValueError("temperature: missing; sampling: temperature needs a number, such as 5")
        if self.sampling != "temperature" and self.temperature is not None:
            raise ValueError(f"temperature: sampling: {self.sampling} does not use it; set sampling: temperature")
        return self

    @property
    def exponent(self) -> float:
        """Of a task's number of batches, in the first epoch."""
        return {"sqrt": 0.5, "temperature": 1.0 / (self.temperature or 1.0)}.get(self.sampling, 1.0)


def without_rows(values: Any) -> Any:
    """The values of a configuration, where `tasks` bring the rows, with a `data` section that has none."""
    if isinstance(values, dict) and values.get("tasks") and "data" not in values:
        return {**values, "data": {"train": ""}}
    return values


def check_tasks(config: RunConfig) -> None:
    """Raise ValueError, the key first, where `tasks` do not fit each other or the rest of the run."""
    if not config.tasks:
        if config.mixing != MixingConfig():
            raise ValueError("mixing: for several tasks; remove it or list them under tasks")
        return
    if len(config.tasks) < 2:
        raise ValueError("tasks: expected at least two; a single one is told by task and data")
    if config.data != type(config.data)(train=""):
        raise ValueError("data: each of tasks has its own; remove it")
    if config.task != type(config.task)():
        raise ValueError("task: each of tasks says its own; remove it")
    if config.method not in METHODS:
        raise ValueError(f"method: {config.method} trains one task; for several: {' or '.join(METHODS)}")
    if config.head.type != "linear":
        raise ValueError(f"head.type: {config.head.type}: heads of several tasks are transformers' own; remove it")
    if config.model.new_words:
        raise ValueError(
            "model.new_words: every task's rows would add words of their own; add them in a run of masked words before and "
            "give that run as model.name"
        )
    if config.training.sharding != "none":
        raise ValueError("training.sharding: the heads of several tasks take turns, which shards do not; remove it")
    for name, task in config.tasks.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"tasks.{name}: expected a name of letters, digits, _ and -, a letter first")
        if task.type == "mlm":
            raise ValueError(
                f"tasks.{name}.type: mlm hides words, which the others need; pretrain in a run of its own and give that "
                "run as model.name"
            )
        if task.metric in SMALLER_IS_BETTER:
            raise ValueError(
                f"tasks.{name}.metric: {task.metric} is better when smaller, and the mean over the tasks picks the best "
                "checkpoint; choose a figure that is better when larger"
            )
        if task.weight != 1.0 and config.mixing.weighting == "uncertainty":
            raise ValueError(f"tasks.{name}.weight: learned with mixing.weighting: uncertainty; remove it")
