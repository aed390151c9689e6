"""The way that reads no text: one answer for everything."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from regraft.engine.data.rows import Rows
from regraft.engine.tasks import Task

NEVER, ALWAYS = -20.0, 20.0


@dataclass(frozen=True)
class Fitted:
    """What was learned, how long that took, and how many bytes it would take to keep."""

    model: Any
    seconds: float
    bytes: int


def fit_majority(rows: Rows, targets: np.ndarray, task: Task) -> Fitted:
    """The most frequent class, the labels that most rows have, or the mean value."""
    began = time.perf_counter()
    if task.type == "regression":
        answer = np.array([float(np.mean(targets))], dtype=np.float32)
    elif task.type == "multilabel":
        answer = np.where(targets.mean(axis=0) >= 0.5, ALWAYS, NEVER).astype(np.float32)
    elif task.type == "ordinal":  # one question a boundary: is it above?
        most = np.bincount(targets, minlength=len(task.labels)).argmax()
        answer = np.where(np.arange(task.outputs) < most, ALWAYS, NEVER).astype(np.float32)
    else:
        answer = np.full(task.outputs, NEVER, dtype=np.float32)
        answer[np.bincount(targets, minlength=task.outputs).argmax()] = 0.0
    return Fitted(lambda few: np.tile(answer, (len(few), 1)), time.perf_counter() - began, answer.nbytes)
