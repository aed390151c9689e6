"""Any number of C labels for each row. A sigmoid a label, binary cross-entropy, a threshold a label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.engine.data.rows import Rows
from regraft.engine.errors import ConfigError, DataError
from regraft.engine.label_names import name_of
from regraft.engine.tasks.base import Metrics, Prediction, Task, ranked
from regraft.engine.tasks.labels import in_order, index_by_name, named_weights, unknown_label

if TYPE_CHECKING:
    from torch import Tensor

    from regraft.engine.config import TaskConfig

SCORE_BINS = 1000


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Elementwise, in float64, without overflow for large negative logits."""
    z = np.clip(logits.astype(np.float64), -700, 700)
    return 1.0 / (1.0 + np.exp(-z))


class MultiLabel(Task):
    type = "multilabel"
    problem_type = "multi_label_classification"
    metrics_known = ("macro_f1", "micro_f1", "subset_accuracy", "loss")

    def __init__(
        self,
        labels: tuple[str, ...],
        *,
        thresholds: np.ndarray | None = None,
        tuned: bool = False,
        positive_weights: np.ndarray | None = None,
        metric: str = "macro_f1",
        numbered: bool = False,
    ) -> None:
        self.labels = labels
        self.numbered = numbered
        self.thresholds = np.full(len(labels), 0.5) if thresholds is None else np.asarray(thresholds, dtype=np.float64)
        self.tuned = tuned
        self.positive_weights = positive_weights
        self._held: dict[Any, Any] = {}
        self.metric = metric
        if metric not in self.metrics_known:
            raise ConfigError(
                f"task.metric: {metric!r} is not a figure of a multilabel task: {', '.join(self.metrics_known)}"
            )

    @classmethod
    def from_rows(cls, config: TaskConfig, train: Rows, label_column: str | int) -> MultiLabel:
        if train.labels is None:
            raise DataError(f"{train.path}: no label column {label_column!r}")
        names = tuple(config.labels) if config.labels else in_order({name_of(v) for row in train.labels for v in row})
        if not names:
            raise DataError(f"{train.path}: no row has a label in column {label_column!r}")
        tuned = config.thresholds == "tuned"
        start = 0.5 if tuned else float(config.thresholds)
        task = cls(
            names,
            thresholds=np.full(len(names), start),
            tuned=tuned,
            metric=config.metric or "macro_f1",
            numbered=bool(config.labels),
        )
        targets, _ = task.encode(train, label_column)
        if config.class_weights == "balanced":
            positive = targets.sum(axis=0)
            task.positive_weights = ((len(train) - positive) / np.maximum(positive, 1)).astype(np.float32)
        elif isinstance(config.class_weights, Mapping):
            task.positive_weights = named_weights(config.class_weights, names, train)
        return task

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> MultiLabel:
        return cls(
            tuple(spec["labels"]),
            thresholds=np.array(spec["thresholds"]),
            metric=spec.get("metric", "macro_f1"),
            numbered=spec.get("numbered", False),
        )

    def spec(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "labels": list(self.labels),
            "thresholds": [round(float(t), 6) for t in self.thresholds],
            "metric": self.metric,
            "numbered": self.numbered,
        }

    @property
    def outputs(self) -> int:
        return len(self.labels)

    def encode(
        self, rows: Rows, label_column: str | int = "label", unknown: str = "error"
    ) -> tuple[np.ndarray, np.ndarray]:
        if rows.labels is None:
            raise DataError(f"{rows.path}: no label column {label_column!r}")
        index = index_by_name(self.labels, numbered=self.numbered)
        targets = np.zeros((len(rows), len(self.labels)), dtype=np.float32)
        kept = np.ones(len(rows), dtype=bool)
        for i, values in enumerate(rows.labels):
            for value in values:
                number = index.get(name_of(value))
                if number is not None:
                    targets[i, number] = 1.0
                elif unknown == "error":
                    raise unknown_label(self.labels, rows, i, label_column, name_of(value))
                else:
                    kept[i] = False
        where = np.flatnonzero(kept)
        return targets[where], where

    def weights(self, targets: np.ndarray) -> np.ndarray:
        return np.ones(len(targets), dtype=np.float32)

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Mean over labels, so that a row weighs the same whatever the number of labels (as in transformers)."""
        import torch
        from torch.nn.functional import binary_cross_entropy_with_logits

        positive = None
        if self.positive_weights is not None:
            # kept where it is used: a step that is replayed as a CUDA graph copies nothing from the host
            if logits.device not in self._held:
                self._held[logits.device] = torch.as_tensor(self.positive_weights, device=logits.device)
            positive = self._held[logits.device]
        cells = binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none", pos_weight=positive)
        return (cells.mean(dim=-1) * weights).sum()

    def metrics(self) -> Metrics:
        return MultiLabelMetrics(self)

    def tune(self, metrics: Metrics) -> bool:
        if self.tuned:
            assert isinstance(metrics, MultiLabelMetrics)
            self.thresholds = metrics.tuned_thresholds()
        return self.tuned

    def example_answer(self) -> dict[str, Any]:
        found = super().example_answer()
        return {"label": [found["label"]], "scores": found["scores"]}

    def decode(self, logits: np.ndarray) -> list[Prediction]:
        answers = []
        for p in sigmoid(logits):
            scores = ranked(self.labels, p)
            chosen = {self.labels[i] for i in np.flatnonzero(p >= self.thresholds)}
            answers.append(Prediction(tuple(n for n in scores if n in chosen), scores))
        return answers

    def worst(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        p = np.clip(sigmoid(logits), 1e-30, 1 - 1e-16)
        return -(targets * np.log(p) + (1 - targets) * np.log1p(-p)).mean(axis=-1).astype(np.float32)

    def describe(self, target: Any) -> str:
        return ", ".join(self.labels[i] for i in np.flatnonzero(target)) or "(none)"


class MultiLabelMetrics(Metrics):
    """Keeps, for each label, how many positive and negative rows fell into each of 1000 score bins: enough for the
    figures at the thresholds in force and for tuning them."""

    def __init__(self, task: MultiLabel) -> None:
        self.task = task
        c = len(task.labels)
        self.histogram = np.zeros((2, c, SCORE_BINS), dtype=np.int64)
        self.counts = np.zeros((3, c), dtype=np.int64)  # true positives, false positives, false negatives
        self.rows = self.exact = 0
        self.loss_sum = 0.0

    def update(self, logits: np.ndarray, targets: np.ndarray) -> None:
        p = sigmoid(logits)
        true, chosen = targets > 0.5, p >= self.task.thresholds
        bins = np.minimum((p * SCORE_BINS).astype(np.int64), SCORE_BINS - 1)
        columns = np.broadcast_to(np.arange(p.shape[1]), p.shape)
        np.add.at(self.histogram, (true.astype(np.int64), columns, bins), 1)
        self.counts += np.stack([(true & chosen).sum(0), (~true & chosen).sum(0), (true & ~chosen).sum(0)])
        self.rows += len(targets)
        self.exact += int((true == chosen).all(axis=1).sum())
        self.loss_sum += float(self.task.worst(logits, targets).sum())

    def state(self) -> Any:
        return self.histogram, self.counts, self.rows, self.exact, self.loss_sum

    def merge(self, state: Any) -> None:
        histogram, counts, rows, exact, loss_sum = state
        self.histogram = self.histogram + histogram
        self.counts = self.counts + counts
        self.rows += rows
        self.exact += exact
        self.loss_sum += loss_sum

    def tuned_thresholds(self) -> np.ndarray:
        """The threshold of each label with the highest F1 on what was added, [C]; labels without a positive row keep
        theirs."""
        above = self.histogram[:, :, ::-1].cumsum(axis=2)[:, :, ::-1]  # rows at or above each bin's lower edge
        negative, positive = above
        total = positive[:, :1]
        f1 = 2 * positive / np.maximum(positive + negative + total, 1)
        best = f1.argmax(axis=1)
        edges = np.maximum(best / SCORE_BINS, 1.0 / SCORE_BINS)
        return np.where(total[:, 0] > 0, edges, self.task.thresholds)

    def compute(self) -> dict[str, float]:
        tp, fp, fn = self.counts
        each = 2 * tp / np.maximum(2 * tp + fp + fn, 1)
        return {
            "macro_f1": float(each.mean()),
            "micro_f1": float(2 * tp.sum() / max(int((2 * tp + fp + fn).sum()), 1)),
            "subset_accuracy": self.exact / max(self.rows, 1),
            "loss": self.loss_sum / max(self.rows, 1),
        }

    def details(self) -> dict[str, Any]:
        tp, fp, fn = self.counts
        return {
            "per_class": [
                {
                    "label": name,
                    "precision": tp[i] / max(tp[i] + fp[i], 1),
                    "recall": tp[i] / max(tp[i] + fn[i], 1),
                    "f1": 2 * tp[i] / max(2 * tp[i] + fp[i] + fn[i], 1),
                    "rows": int(tp[i] + fn[i]),
                    "threshold": float(self.task.thresholds[i]),
                }
                for i, name in enumerate(self.task.labels)
            ]
        }
