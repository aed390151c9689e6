"""What every task states once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from regraft.engine.data.rows import Rows

if TYPE_CHECKING:
    from torch import Tensor

    from regraft.engine.config import TaskConfig


@dataclass(frozen=True)
class Prediction:
    """One answer. `label`: the class, the labels above their thresholds, or the number. `scores`: probability of
    every label by name, highest first; empty for a regression."""

    label: str | tuple[str, ...] | float
    scores: Mapping[str, float]

    def top(self, k: int | None) -> dict[str, float]:
        """The k highest scores, all for None."""
        return dict(list(self.scores.items())[:k])


class Metrics(ABC):
    """Adds up what it needs batch by batch; memory does not grow with the number of classes times rows."""

    @abstractmethod
    def update(self, logits: np.ndarray, targets: np.ndarray) -> None:
        """Add rows. Shape: logits [B, C] float32, targets as `Task.encode` gives them."""

    @abstractmethod
    def state(self) -> Any:
        """What has been added so far, for `merge`; picklable."""

    @abstractmethod
    def merge(self, state: Any) -> None:
        """Add what another process has seen."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Figures by name, in [0, 1] or [-1, 1] (a regression's errors in the label's unit)."""

    def details(self) -> dict[str, Any]:
        """JSON for the report: per-class table, confusion matrix, calibration."""
        return {}


class Task(ABC):
    """Columns to targets, loss, metrics, decoded answers.

    `metric` is the figure that picks the best checkpoint; `greater_is_better` its direction.
    """

    type: ClassVar[str]
    problem_type: ClassVar[str]
    labels: tuple[str, ...]
    metric: str
    metrics_known: ClassVar[tuple[str, ...]]
    scale: tuple[float, float] | None = None  # mean and spread of numeric targets, see output_scale.py
    smaller_is_better: ClassVar[tuple[str, ...]] = ("loss", "mse", "mae")

    @classmethod
    @abstractmethod
    def from_rows(cls, config: TaskConfig, train: Rows, label_column: str | int) -> Task: ...

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Task: ...

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """JSON that `task_from_spec` turns into this task again."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Columns of the logits."""

    @abstractmethod
    def encode(
        self, rows: Rows, label_column: str | int = "label", unknown: str = "error"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Targets of the rows and the indices of the rows that are kept ([N'] int64).

        All are kept unless `unknown` is 'drop'. Raises DataError naming file, line and label.
        """

    @abstractmethod
    def weights(self, targets: np.ndarray) -> np.ndarray:
        """Weight of each row in the loss, [N] float32. The loss of an optimizer step is divided by their sum."""

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the rows' losses, a scalar in fp32. Shape: logits [B, C], weights [B]."""

    @abstractmethod
    def metrics(self) -> Metrics: ...

    @abstractmethod
    def decode(self, logits: np.ndarray) -> list[Prediction]:
        """Answers for logits [B, C] float32."""

    @property
    def greater_is_better(self) -> bool:
        return self.metric not in self.smaller_is_better

    def worst(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """How wrong each row is, [B] float32: its loss in plain numpy, for the report's list of worst errors."""
        raise NotImplementedError

    def describe(self, target: Any) -> str:
        """A target as a person reads it."""
        return str(target)


def ranked(labels: Sequence[str], scores: np.ndarray) -> dict[str, float]:
    """Scores [C] by label name, highest first."""
    return {labels[i]: float(scores[i]) for i in np.argsort(-scores, kind="stable")}
