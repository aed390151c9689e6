"""One of several tasks answers each text, as its request says: the adapters of one bundle."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from regraft.engine.tasks.base import Prediction, Task
from regraft.engine.tasks.several import Several


class Adapters(Several):
    """`tasks` by the names of their adapters. A row of logits belongs to one of them, its first columns to that task."""

    type = "adapters"
    # A text is read as one task reads it, and which one that is stands beside it.
    take, inputs, examples, answers = Task.take, Task.inputs, Task.examples, Task.answers

    @property
    def outputs(self) -> int:
        return max(task.outputs for task in self.tasks.values())

    def decode(self, logits: np.ndarray) -> NoReturn:
        raise NotImplementedError("which task answers is said with each text: decode_with")

    def decode_with(self, name: str, logits: np.ndarray) -> list[Prediction]:
        """Answers of the task `name` for logits [B, C or more]."""
        task = self.tasks[name]
        return task.decode(np.ascontiguousarray(logits[:, : task.outputs]))

    def answer(self, prediction: Prediction, top_k: int | None) -> NoReturn:
        raise NotImplementedError("the task that made a prediction shapes it too")

    def example_answer(self) -> dict[str, Any]:
        return self.first.example_answer()

    @property
    def first(self) -> Task:
        return next(iter(self.tasks.values()))
