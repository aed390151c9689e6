"""One class of C for each row. Softmax, cross-entropy with class weights and label smoothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.engine.data.rows import Rows
from regraft.engine.errors import ConfigError, DataError
from regraft.engine.tasks.base import Metrics, Prediction, Task, ranked
from regraft.engine.tasks.labels import find_names, label_index, named_weights

if TYPE_CHECKING:
    from torch import Tensor

    from regraft.engine.config import TaskConfig

CALIBRATION_BINS = 10


def softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise softmax in float64, so that what is printed sums to one. Shape: [B, C] -> [B, C]."""
    z = logits.astype(np.float64)
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


class Classification(Task):
    type = "classification"
    problem_type = "single_label_classification"
    metrics_known = ("accuracy", "macro_f1", "micro_f1", "matthews", "loss")

    def __init__(
        self,
        labels: tuple[str, ...],
        *,
        class_weights: np.ndarray | None = None,
        label_smoothing: float = 0.0,
        metric: str = "accuracy",
        numbered: bool = False,
    ) -> None:
        self.labels = labels
        self.numbered = numbered
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing
        self.metric = metric
        if metric not in self.metrics_known:
            raise ConfigError(
                f"task.metric: {metric!r} is not a figure of a classification: {', '.join(self.metrics_known)}"
            )

    @classmethod
    def from_rows(cls, config: TaskConfig, train: Rows, label_column: str | int) -> Classification:
        names = tuple(config.labels) if config.labels else find_names(train, label_column)
        if len(names) < 2:
            raise DataError(
                f"{train.path}: all {len(train)} rows have the label {names[0]!r}; a classification needs at least two classes"
            )
        task = cls(
            names,
            label_smoothing=config.label_smoothing,
            metric=config.metric or "accuracy",
            numbered=bool(config.labels),
        )
        targets, _ = task.encode(train, label_column)
        counts = np.bincount(targets, minlength=len(names))
        if (counts > 0).sum() < 2:
            raise DataError(f"{train.path}: all {len(train)} rows have the label {names[int(counts.argmax())]!r}")
        if config.class_weights == "balanced":
            task.class_weights = (len(train) / (len(names) * np.maximum(counts, 1))).astype(np.float32)
        elif isinstance(config.class_weights, Mapping):
            task.class_weights = named_weights(config.class_weights, names, train)
        return task

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Classification:
        metric, numbered = spec.get("metric", "accuracy"), spec.get("numbered", False)
        return cls(tuple(spec["labels"]), metric=metric, numbered=numbered)

    def spec(self) -> dict[str, Any]:
        return {"type": self.type, "labels": list(self.labels), "metric": self.metric, "numbered": self.numbered}

    @property
    def outputs(self) -> int:
        return len(self.labels)

    def encode(
        self, rows: Rows, label_column: str | int = "label", unknown: str = "error"
    ) -> tuple[np.ndarray, np.ndarray]:
        return label_index(self.labels, rows, label_column, unknown, numbered=self.numbered)

    def weights(self, targets: np.ndarray) -> np.ndarray:
        if self.class_weights is None:
            return np.ones(len(targets), dtype=np.float32)
        return self.class_weights[targets]

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        from torch.nn.functional import cross_entropy

        rows = cross_entropy(logits.float(), targets, reduction="none", label_smoothing=self.label_smoothing)
        return (rows * weights).sum()

    def metrics(self) -> Metrics:
        return ClassificationMetrics(self.labels)

    def decode(self, logits: np.ndarray) -> list[Prediction]:
        probabilities = softmax(logits)
        best = probabilities.argmax(axis=-1)
        return [Prediction(self.labels[b], ranked(self.labels, p)) for b, p in zip(best, probabilities, strict=True)]

    def worst(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        p = softmax(logits)[np.arange(len(targets)), targets]
        return -np.log(np.maximum(p, 1e-30)).astype(np.float32)

    def describe(self, target: Any) -> str:
        return self.labels[int(target)]


class ClassificationMetrics(Metrics):
    """Keeps a confusion matrix [C, C] and calibration bins; scikit-learn reads its figures from the matrix."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        self.labels = labels
        self.confusion = np.zeros((len(labels), len(labels)), dtype=np.int64)
        self.loss_sum = 0.0
        self.bins = np.zeros((CALIBRATION_BINS, 3))  # rows, sum of confidence, right answers

    def update(self, logits: np.ndarray, targets: np.ndarray) -> None:
        p = softmax(logits)
        predicted, confidence = p.argmax(axis=-1), p.max(axis=-1)
        np.add.at(self.confusion, (targets, predicted), 1)
        self.loss_sum += float(-np.log(np.maximum(p[np.arange(len(targets)), targets], 1e-30)).sum())
        which = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
        np.add.at(self.bins, which, np.stack([np.ones_like(confidence), confidence, predicted == targets], axis=1))

    def state(self) -> Any:
        return self.confusion, self.loss_sum, self.bins

    def merge(self, state: Any) -> None:
        confusion, loss_sum, bins = state
        self.confusion = self.confusion + confusion
        self.loss_sum += loss_sum
        self.bins = self.bins + bins

    def _cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # One weighted row a cell of the matrix: the library's figures without a row for each prediction.
        true, predicted = np.nonzero(self.confusion)
        return true, predicted, self.confusion[true, predicted]

    def compute(self) -> dict[str, float]:
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        true, predicted, weight = self._cells()
        seen = np.unique(np.concatenate([true, predicted]))
        f1 = {
            average: f1_score(true, predicted, sample_weight=weight, average=average, labels=seen, zero_division=0)
            for average in ("macro", "micro")
        }
        total = int(self.confusion.sum())
        return {
            "accuracy": float(accuracy_score(true, predicted, sample_weight=weight)),
            "macro_f1": float(f1["macro"]),
            "micro_f1": float(f1["micro"]),
            "matthews": float(matthews_corrcoef(true, predicted, sample_weight=weight)) if len(seen) > 1 else 0.0,
            "loss": self.loss_sum / max(total, 1),
        }

    def details(self) -> dict[str, Any]:
        from sklearn.metrics import precision_recall_fscore_support

        true, predicted, weight = self._cells()
        numbers = range(len(self.labels))
        precision, recall, f1, _ = precision_recall_fscore_support(
            true, predicted, sample_weight=weight, labels=list(numbers), zero_division=0
        )
        rows = self.confusion.sum(axis=1)
        return {
            "per_class": [
                {
                    "label": self.labels[i],
                    "precision": precision[i],
                    "recall": recall[i],
                    "f1": f1[i],
                    "rows": int(rows[i]),
                }
                for i in numbers
            ],
            "confusion": {"labels": list(self.labels), "matrix": self.confusion.tolist()},
            "calibration": [
                {"rows": int(n), "confidence": c / n, "accuracy": a / n} for n, c, a in self.bins.tolist() if n
            ],
        }
