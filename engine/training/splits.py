"""The labelled rows of a run, without tokens: read, checked, their labels turned into targets. Knows no torch."""

from __future__ import annotations

import numpy as np

from regraft.engine.config import RunConfig
from regraft.engine.data.read import read_split
from regraft.engine.data.rows import Rows
from regraft.engine.data.split import split_dev
from regraft.engine.errors import ConfigError, DataError
from regraft.engine.tasks import Task, build_task, task_class
from regraft.engine.tasks.base import FIRST

Splits = dict[str, tuple[Rows, np.ndarray]]


def read_parts(config: RunConfig) -> tuple[Task, dict[str, Rows]]:
    """The task, and the rows of train, dev and perhaps test. Raises DataError."""
    if config.tasks:
        raise ConfigError("tasks: several tasks are learned by `regraft train`; this takes one, told by task and data")
    data, kind = config.data, task_class(config.task.type)
    train = read_split(kind, data, "train")
    task = build_task(config.task, train, data.columns.label)
    data = task.like_training(data)
    if data.dev is not None:
        dev = read_split(kind, data, "dev")
    else:
        train, dev = split_dev(train, data.dev_fraction, config.training.seed, kind.kind())
    parts = {"train": train, "dev": dev}
    if data.test is not None:
        parts["test"] = read_split(kind, data, "test")
    return task, parts


def read_splits(config: RunConfig) -> tuple[Task, Splits]:
    """The task, rows and targets of every split, of a task that has one target a text.

    What a rule dropped is counted in the rows. Raises DataError, and ConfigError for another task.
    """
    task, parts = read_parts(config)
    # A task that makes sequences of its own has no one row of features a text.
    if task.reads != FIRST or type(task).examples is not Task.examples:
        raise ConfigError(
            f"task.type: {task.type}; what is asked for is for tasks with one answer a text: classification, multilabel, "
            "regression, ordinal"
        )
    splits: Splits = {}
    for name, rows in parts.items():
        unknown = "error" if name == "train" else config.data.unknown_label
        targets, kept = task.encode(rows, config.data.columns.label, unknown)
        if len(kept) < len(rows):
            rows = rows.take(kept, dropped={**rows.dropped, "unknown_label": len(rows) - len(kept)})
        if not len(rows):
            raise DataError(f"{rows.path}: no row of the {name} split is left after the rules in data: {rows.dropped}")
        splits[name] = (rows, targets)
    return task, splits
