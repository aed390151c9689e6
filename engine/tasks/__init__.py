"""One task, one file: labels in, loss, metrics, decoded answers out.

Used alike by training, evaluation, prediction, export and the server; only the losses need torch, and import it
themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from regraft.engine.data.rows import Rows
from regraft.engine.tasks.base import Prediction, Task
from regraft.engine.tasks.classification import Classification
from regraft.engine.tasks.multilabel import MultiLabel
from regraft.engine.tasks.regression import Regression

if TYPE_CHECKING:
    from regraft.engine.config import TaskConfig

__all__ = ["Classification", "MultiLabel", "Prediction", "Regression", "Task", "build_task", "task_from_spec"]

TASKS: dict[str, type[Task]] = {"classification": Classification, "multilabel": MultiLabel, "regression": Regression}


def build_task(config: TaskConfig, train: Rows, label_column: str | int = "label") -> Task:
    """The configured task, with what it learns from the training labels (names, class weights).

    Raises DataError naming the row when a label cannot be used.
    """
    return TASKS[config.type].from_rows(config, train, label_column)


def task_from_spec(spec: Mapping[str, Any]) -> Task:
    """The task as it was written into a model folder or a bundle by `Task.spec`."""
    return TASKS[spec["type"]].from_spec(spec)
