"""The labelled rows of a run: read, checked, their labels turned into targets. Knows neither tokens nor torch."""

from __future__ import annotations

import numpy as np

from regraft.engine.config import RunConfig
from regraft.engine.data.read import read_rows
from regraft.engine.data.rows import Rows
from regraft.engine.data.split import split_dev
from regraft.engine.errors import DataError
from regraft.engine.tasks import Task, build_task

Splits = dict[str, tuple[Rows, np.ndarray]]


def read_splits(config: RunConfig) -> tuple[Task, Splits, dict[str, dict[str, int]]]:
    """The task, rows and targets of train, dev and perhaps test, and how many rows each rule dropped of each.

    Raises DataError.
    """
    data, kind = config.data, config.task.type
    train = read_rows(data, "train", task_type=kind)
    task = build_task(config.task, train, data.columns.label)
    if data.dev is not None:
        dev = read_rows(data, "dev", task_type=kind)
    else:
        train, dev = split_dev(train, data.dev_fraction, config.training.seed, kind)
    parts = {"train": train, "dev": dev}
    if data.test is not None:
        parts["test"] = read_rows(data, "test", task_type=kind)
    splits: Splits = {}
    dropped_by = {}
    for name, rows in parts.items():
        unknown = "error" if name == "train" else data.unknown_label
        targets, kept = task.encode(rows, data.columns.label, unknown)
        dropped = dict(rows.dropped)
        if len(kept) < len(rows):
            dropped["unknown_label"] = len(rows) - len(kept)
            rows = rows.take(kept, dropped=dropped)
        if not len(rows):
            raise DataError(f"{rows.path}: no row of the {name} split is left after the rules in data: {dropped}")
        splits[name], dropped_by[name] = (rows, targets), dropped
    return task, splits, dropped_by


def label_counts(task: Task, targets: np.ndarray) -> dict[str, int]:
    """Rows of each label; empty for a regression."""
    if task.type == "regression":
        return {}
    counts = targets.sum(axis=0) if targets.ndim == 2 else np.bincount(targets, minlength=len(task.labels))
    return {label: int(n) for label, n in zip(task.labels, counts, strict=True)}
