"""Several tasks over one encoder: a bundle that runs the encoder once and answers for every head.

It is put together from trained models (`regraft export A B --to BUNDLE`) and never trained itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from regraft.engine.data.rows import Rows
from regraft.engine.errors import ConfigError
from regraft.engine.tasks.base import Metrics, Prediction, Task

if TYPE_CHECKING:
    from regraft.engine.config import TaskConfig


class Several(Task):
    """`tasks` by name; their logits stand side by side."""

    type = "several"
    labels = ()
    metric = ""
    metrics_known = ()

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        self.tasks = dict(tasks)

    @classmethod
    def from_rows(cls, config: TaskConfig, train: Rows, label_column: str | int) -> Several:
        raise ConfigError("task.type: several is made of trained models: `regraft export RUN RUN --to BUNDLE`")

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Several:
        from regraft.engine.tasks import task_from_spec

        return cls({name: task_from_spec(own) for name, own in spec["tasks"].items()})

    def spec(self) -> dict[str, Any]:
        return {"type": self.type, "tasks": {name: task.spec() for name, task in self.tasks.items()}}

    @property
    def outputs(self) -> int:
        return sum(task.outputs for task in self.tasks.values())

    def encode(self, rows: Rows, label_column: str | int = "label", unknown: str = "error") -> NoReturn:
        raise ConfigError("several heads have no one label a row; evaluate the models they were made of")

    def weights(self, targets: np.ndarray) -> NoReturn:
        raise NotImplementedError("several heads are not trained together")

    def loss(self, logits: Any, targets: Any, weights: Any) -> NoReturn:
        raise NotImplementedError("several heads are not trained together")

    def metrics(self) -> Metrics:
        raise NotImplementedError("several heads have no one figure")

    def decode(self, logits: np.ndarray) -> list[Prediction]:
        """One answer a text; its `extra` holds each head's prediction by name. Shape: [B, sum of all C]."""
        ends = np.cumsum([task.outputs for task in self.tasks.values()])
        parts = np.split(logits, ends[:-1], axis=1)
        each = [task.decode(part) for task, part in zip(self.tasks.values(), parts, strict=True)]
        return [self._joined(dict(zip(self.tasks, row, strict=True))) for row in zip(*each, strict=True)]

    def _joined(self, predictions: dict[str, Prediction]) -> Prediction:
        label = "; ".join(f"{name}: {self.tasks[name].shown(p)}" for name, p in predictions.items())
        return Prediction(label, {}, extra=predictions)

    def answer(self, prediction: Prediction, top_k: int | None) -> dict[str, Any]:
        heads = {name: task.answer(prediction.extra[name], top_k) for name, task in self.tasks.items()}
        return {"label": prediction.label, "heads": heads}

    def example_answer(self) -> dict[str, Any]:
        return {"heads": {name: task.example_answer() for name, task in self.tasks.items()}}
