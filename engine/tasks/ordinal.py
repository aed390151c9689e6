"""One of C classes that have an order, as C - 1 questions "is it above class k?" (Frank and Hall 2001; with one slope
for all questions, CORAL, Cao 2020): logits z + b_k would be CORAL, here each question has its own logit.

P(above k) = sigmoid(z_k); made to fall with k, they give every class its probability.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.engine.data.rows import Rows
from regraft.engine.errors import ConfigError, DataError
from regraft.engine.tasks.base import Metrics, Prediction, Task, ranked
from regraft.engine.tasks.labels import find_names, label_index, value_of
from regraft.engine.tasks.multilabel import sigmoid

if TYPE_CHECKING:
    from torch import Tensor

    from regraft.engine.config import TaskConfig


class Ordinal(Task):
    type = "ordinal"
    metrics_known = ("quadratic_kappa", "accuracy", "mae", "spearman")

    def __init__(self, labels: tuple[str, ...], *, metric: str | None = None) -> None:
        self.labels = labels
        self.metric = metric or "quadratic_kappa"
        if self.metric not in self.metrics_known:
            raise ConfigError(f"task.metric: {metric!r} is not a figure of ordinal: {', '.join(self.metrics_known)}")

    @classmethod
    def kind(cls) -> str:
        return "classification"

    @classmethod
    def from_rows(cls, config: TaskConfig, train: Rows, label_column: str | int) -> Ordinal:
        names = tuple(config.labels) if config.labels else find_names(train, label_column)
        if len(names) < 2:
            raise DataError(f"{train.path}: all {len(train)} rows have the label {names[0]!r}")
        if not config.labels:
            values = {name: value_of(name) for name in names}
            if None in values.values():
                shown = ", ".join(names[:8])
                raise ConfigError(f"task.labels: the order of {shown} is not known; list them, lowest first")
            names = tuple(sorted(names, key=lambda name: values[name] or 0.0))
        return cls(names, metric=config.metric)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Ordinal:
        return cls(tuple(spec["labels"]), metric=spec["metric"])

    def spec(self) -> dict[str, Any]:
        return {"type": self.type, "labels": list(self.labels), "metric": self.metric}

    @property
    def outputs(self) -> int:
        return len(self.labels) - 1

    def encode(
        self, rows: Rows, label_column: str | int = "label", unknown: str = "error"
    ) -> tuple[np.ndarray, np.ndarray]:
        # Words have their order from the user's list, so a place in it says which is meant.
        return label_index(self.labels, rows, label_column, unknown, numbered=True)

    def label_counts(self, targets: np.ndarray) -> dict[str, int]:
        return dict(zip(self.labels, np.bincount(targets, minlength=len(self.labels)).tolist(), strict=True))

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Mean of the questions' binary cross-entropies, a row. Shape: logits [B, C - 1]."""
        import torch
        from torch.nn.functional import binary_cross_entropy_with_logits

        above = (targets[:, None] > torch.arange(logits.shape[1], device=targets.device)[None]).float()
        cells = binary_cross_entropy_with_logits(logits.float(), above, reduction="none")
        return (cells.mean(dim=-1) * weights).sum()

    def metrics(self) -> Metrics:
        return OrdinalMetrics(self)

    def chances(self, logits: np.ndarray) -> np.ndarray:
        """Probability of every class, [B, C], from "above" probabilities made to fall."""
        above = np.minimum.accumulate(sigmoid(logits), axis=-1)
        ones, zeros = np.ones((len(above), 1)), np.zeros((len(above), 1))
        return np.concatenate([ones, above], axis=1) - np.concatenate([above, zeros], axis=1)

    def classes(self, logits: np.ndarray) -> np.ndarray:
        """The median class: as many steps up as questions are answered with yes. [B] int64."""
        return (np.minimum.accumulate(sigmoid(logits), axis=-1) > 0.5).sum(axis=-1)

    def decode(self, logits: np.ndarray) -> list[Prediction]:
        found = zip(self.classes(logits), self.chances(logits), strict=True)
        return [Prediction(self.labels[c], ranked(self.labels, p)) for c, p in found]

    def worst(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        p = self.chances(logits)[np.arange(len(targets)), targets]
        return (np.abs(self.classes(logits) - targets) - np.log(np.maximum(p, 1e-30))).astype(np.float32)

    def describe(self, target: Any) -> str:
        return self.labels[int(target)]


class OrdinalMetrics(Metrics):
    """Keeps a confusion matrix [C, C]."""

    def __init__(self, task: Ordinal) -> None:
        self.task = task
        self.confusion = np.zeros((len(task.labels), len(task.labels)), dtype=np.int64)

    def update(self, logits: np.ndarray, targets: np.ndarray) -> None:
        np.add.at(self.confusion, (targets, self.task.classes(logits)), 1)

    def state(self) -> Any:
        return self.confusion

    def merge(self, state: Any) -> None:
        self.confusion = self.confusion + state

    def compute(self) -> dict[str, float]:
        from scipy.stats import spearmanr

        n = max(int(self.confusion.sum()), 1)
        true, found = np.indices(self.confusion.shape)
        off = (true - found) ** 2
        expected = np.outer(self.confusion.sum(axis=1), self.confusion.sum(axis=0)) / n
        chance = float((off * expected).sum())
        each = [np.repeat(axis.ravel(), self.confusion.ravel()) for axis in (true, found)]
        varies = all(len(x) > 1 and np.ptp(x) > 0 for x in each)
        return {
            "quadratic_kappa": 1.0 - float((off * self.confusion).sum()) / chance if chance else 0.0,
            "accuracy": float(np.trace(self.confusion)) / n,
            "mae": float((np.abs(true - found) * self.confusion).sum()) / n,
            "spearman": float(spearmanr(*each).statistic) if varies else 0.0,
        }

    def details(self) -> dict[str, Any]:
        return {"confusion": {"labels": list(self.task.labels), "matrix": self.confusion.tolist()}}
