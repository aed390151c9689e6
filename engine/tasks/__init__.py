"""One task, one file: labels in, loss, metrics, decoded answers out.

Used alike by training, evaluation, prediction, export and the server; only the losses need torch, and import it
themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from regraft.engine.data.rows import Rows
from regraft.engine.errors import ConfigError, nearest
from regraft.engine.tasks.adapters import Adapters
from regraft.engine.tasks.answering import Answering
from regraft.engine.tasks.base import Prediction, Task
from regraft.engine.tasks.choice import Choice
from regraft.engine.tasks.classification import Classification
from regraft.engine.tasks.mlm import MaskedLanguage
from regraft.engine.tasks.multilabel import MultiLabel
from regraft.engine.tasks.ordinal import Ordinal
from regraft.engine.tasks.regression import Regression
from regraft.engine.tasks.several import Several
from regraft.engine.tasks.tagging import Tagging

if TYPE_CHECKING:
    from regraft.engine.config import TaskConfig

__all__ = [
    "Adapters",
    "Answering",
    "Choice",
    "Classification",
    "MaskedLanguage",
    "MultiLabel",
    "Ordinal",
    "Prediction",
    "Regression",
    "Tagging",
    "Task",
    "build_task",
    "task_class",
    "task_from_spec",
]

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "multilabel": MultiLabel,
    "regression": Regression,
    "several": Several,
    "adapters": Adapters,
    "tagging": Tagging,
    "answering": Answering,
    "mlm": MaskedLanguage,
    "choice": Choice,
    "ordinal": Ordinal,
}


def build_task(config: TaskConfig, train: Rows, label_column: str | int = "label") -> Task:
    """The configured task, with what it learns from the training labels (names, class weights).

    Raises DataError naming the row when a label cannot be used.
    """
    return task_class(config.type).from_rows(config, train, label_column)


def task_class(name: str) -> type[Task]:
    """A task by its type: a name of ours, or MODULE:CLASS for one of your own. Raises ConfigError."""
    if name in TASKS:
        return TASKS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        known = ", ".join(sorted(TASKS))
        raise ConfigError(f"task.type: {name!r} is not known{nearest(name, TASKS)}; expected {known} or MODULE:CLASS")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"task.type: {name}: cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"task.type: {name}: is no subclass of regraft.engine.tasks.Task")
    found.type = name
    return found


def task_from_spec(spec: Mapping[str, Any]) -> Task:
    """The task as it was written into a model folder or a bundle by `Task.spec`."""
    return task_class(spec["type"]).from_spec(spec)
