"""One number for each row. Mean squared error; Pearson and Spearman correlation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.engine.data.rows import Rows
from regraft.engine.errors import ConfigError, DataError
from regraft.engine.tasks.base import Metrics, Prediction, Task

if TYPE_CHECKING:
    from torch import Tensor

    from regraft.engine.config import TaskConfig


class Regression(Task):
    type = "regression"
    problem_type = "regression"
    labels = ("value",)
    metrics_known = ("pearson", "spearman", "mse", "mae")

    def __init__(self, *, metric: str = "pearson") -> None:
        self.metric = metric
        if metric not in self.metrics_known:
            raise ConfigError(
                f"task.metric: {metric!r} is not a figure of a regression: {', '.join(self.metrics_known)}"
            )

    @classmethod
    def from_rows(cls, config: TaskConfig, train: Rows, label_column: str | int) -> Regression:
        task = cls(metric=config.metric or "pearson")
        targets, _ = task.encode(train, label_column)
        if np.ptp(targets) == 0:
            raise DataError(
                f"{train.path}: all {len(train)} rows have the value {targets[0]:g}; there is nothing to learn"
            )
        task.scale = (float(targets.mean(dtype=np.float64)), float(targets.std(dtype=np.float64)))
        return task

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Regression:
        return cls(metric=spec.get("metric", "pearson"))

    def spec(self) -> dict[str, Any]:
        return {"type": self.type, "labels": list(self.labels), "metric": self.metric}

    @property
    def outputs(self) -> int:
        return 1

    def encode(
        self, rows: Rows, label_column: str | int = "label", unknown: str = "error"
    ) -> tuple[np.ndarray, np.ndarray]:
        if rows.labels is None:
            raise DataError(f"{rows.path}: no label column {label_column!r}")
        targets = np.empty(len(rows), dtype=np.float32)
        for i, value in enumerate(rows.labels):
            try:
                targets[i] = float(value)
            except (TypeError, ValueError):
                raise DataError(f"{rows.where(i, label_column)}: {value!r} is not a number") from None
            if not math.isfinite(targets[i]):
                raise DataError(f"{rows.where(i, label_column)}: {value!r} is not a finite number")
        return targets, np.arange(len(rows))

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        # In units of the spread: 1 is what the mean of all labels would score, whatever the labels' unit.
        spread = self.scale[1] if self.scale else 1.0
        return (((logits.float().squeeze(-1) - targets) / spread).square() * weights).sum()

    def metrics(self) -> Metrics:
        return RegressionMetrics()

    def example_answer(self) -> dict[str, Any]:
        return {"label": 3.4}

    def decode(self, logits: np.ndarray) -> list[Prediction]:
        return [Prediction(float(x), {}) for x in logits[:, 0]]

    def worst(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return np.square(logits[:, 0] - targets)

    def describe(self, target: Any) -> str:
        return f"{float(target):g}"


class RegressionMetrics(Metrics):
    """Keeps the two numbers of each row (8 bytes): ranks need them all."""

    def __init__(self) -> None:
        self.predicted: list[np.ndarray] = []
        self.true: list[np.ndarray] = []

    def update(self, logits: np.ndarray, targets: np.ndarray) -> None:
        self.predicted.append(logits[:, 0].astype(np.float32))
        self.true.append(targets.astype(np.float32))

    def state(self) -> Any:
        return self.predicted, self.true

    def merge(self, state: Any) -> None:
        self.predicted = self.predicted + state[0]
        self.true = self.true + state[1]

    def compute(self) -> dict[str, float]:
        from scipy.stats import pearsonr, spearmanr

        predicted = np.concatenate(self.predicted).astype(np.float64)
        true = np.concatenate(self.true).astype(np.float64)
        # A constant has no correlation; 0 says "no better than guessing" and can be compared.
        varies = len(true) > 1 and np.ptp(predicted) > 0 and np.ptp(true) > 0
        return {
            "pearson": float(pearsonr(predicted, true).statistic) if varies else 0.0,
            "spearman": float(spearmanr(predicted, true).statistic) if varies else 0.0,
            "mse": float(np.square(predicted - true).mean()),
            "mae": float(np.abs(predicted - true).mean()),
        }

    def details(self) -> dict[str, Any]:
        predicted, true = np.concatenate(self.predicted), np.concatenate(self.true)
        step = max(1, len(true) // 500)
        return {"scatter": [[float(t), float(p)] for t, p in zip(true[::step], predicted[::step], strict=True)]}
