"""What every task states once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from regraft.engine.data.rows import Rows
from regraft.engine.examples import Examples
from regraft.engine.figures import figure

if TYPE_CHECKING:
    from torch import Tensor

    from regraft.engine.config import DataConfig, TaskConfig
    from regraft.engine.data.fast_tokenizer import FastTokenizer

FIRST, TOKENS, MARKED = "first", "tokens", "marked"
Outputs = Sequence[np.ndarray]


@dataclass(frozen=True)
class Span:
    """A part of a text: characters `start` up to `end`, what it is, and how probable that is."""

    start: int
    end: int
    label: str
    text: str
    score: float


@dataclass(frozen=True)
class Prediction:
    """One answer. `label`: the class, the labels above their thresholds, the number, or the text that answers.
    `scores`: probability of every label by name, highest first; empty where there are none. `spans`: parts of the
    text, for tasks that find some. `extra`: what else the task has to say, as JSON."""

    label: str | tuple[str, ...] | float
    scores: Mapping[str, float]
    spans: tuple[Span, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

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

    What a task gives for one row is given by `encode`, `weights`, `loss`, `metrics`, `decode`: these are enough for
    a task with one sequence and one vector of logits a row. A task with windows, with several sequences a row or with
    logits at tokens says so by `reads` and states the `examples`, `score` and `answers` below for itself.

    `reads`: the rows of hidden states that the head needs: the FIRST of each sequence (logits [B, C]), all TOKENS
    (logits [T, C]) or those that are MARKED (logits [M, C]). `auto_model`: transformers' class that has such a head.
    All but `loss` and `attach` run without torch, in the server too.
    """

    type: ClassVar[str]
    problem_type: ClassVar[str | None] = None
    reads: str = FIRST
    auto_model: str = "AutoModelForSequenceClassification"
    labels: tuple[str, ...]
    metric: str
    metrics_known: ClassVar[tuple[str, ...]]
    scale: tuple[float, float] | None = None  # mean and spread of numeric targets, see output_scale.py
    smaller_is_better: ClassVar[tuple[str, ...]] = ("loss", "mse", "mae")
    remarks: ClassVar[tuple[str, ...]] = ()  # of `Examples.counts`, those that are no labels: told when a run begins

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

    def weights(self, targets: np.ndarray) -> np.ndarray:
        """Weight of each row in the loss, [N] float32. The loss of an optimizer step is divided by their sum."""
        return np.ones(len(targets), dtype=np.float32)

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

    # -- rows, sequences, answers: as they stand here, one sequence and one vector of logits a row ---------------------

    @classmethod
    def read(
        cls, path: str, data: DataConfig, *, split: str, need_labels: bool = True, limit: int | None = None
    ) -> Rows:
        """Rows of a file. Raises DataError naming file, line and column."""
        from regraft.engine.data.read import read_file

        return read_file(path, data, split=split, task_type=cls.kind(), need_labels=need_labels, limit=limit)

    def like_training(self, data: DataConfig) -> DataConfig:
        """`data` for held-out rows: what it leaves open is as it was found in the training rows."""
        return data

    @classmethod
    def kind(cls) -> str:
        """What a usable label looks like to the readers of rows: 'classification', 'multilabel' or 'regression'."""
        return cls.type

    @classmethod
    def inputs(cls, source: Any, data: DataConfig, dropped: dict[str, int]) -> Iterator[tuple[str, Any]]:
        """Texts to be answered, of a file or an open stream, one by one, each with what stands beside it."""
        from regraft.engine.data.read import iter_texts, with_blank_texts
        from regraft.engine.data.source import is_plain_text

        plain = is_plain_text(source, data) if isinstance(source, str) else data.columns.text_pair is None
        data = with_blank_texts(data) if plain else data
        return ((row.text, row.pair) for row in iter_texts(source, data, dropped=dropped))

    @classmethod
    def take(cls, item: Mapping[str, Any]) -> tuple[str, Any]:
        """Text, and what stands beside it, of an object in a request or a line of JSON. Raises ValueError."""
        unknown = set(item) - {"text", "text_pair"}
        if unknown:
            raise ValueError(f"{min(unknown)}: not known; expected 'text' and, for a pair, 'text_pair'")
        if not isinstance(item.get("text"), str):
            raise ValueError("text: expected a text" if "text" in item else "text: field required")
        return item["text"], item.get("text_pair")

    @classmethod
    def beside(cls, text: str, other: Any) -> dict[str, Any]:
        """What stood beside a text, as `take` gave it, in the words of the input: for `predict` to repeat."""
        return {} if other is None else {"text_pair": other}

    def examples(
        self,
        rows: Rows,
        tokenizer: FastTokenizer,
        max_length: int,
        *,
        label_column: str | int = "label",
        unknown: str = "error",
        labelled: bool = True,
    ) -> Examples:
        """Sequences of the rows that are kept, with targets where `labelled`. Raises DataError."""
        from regraft.engine.data.cache import cache_folder
        from regraft.engine.data.tokens import encode, tokenize

        if not labelled:
            store = encode(rows.texts, rows.pairs, tokenizer, max_length)
            return Examples(rows, store, None, np.ones(len(rows), dtype=np.float32))
        targets, kept = self.encode(rows, label_column, unknown)
        if len(kept) < len(rows):
            rows = rows.take(kept, dropped={**rows.dropped, "unknown_label": len(rows) - len(kept)})
        if not len(rows):
            return Examples(rows, encode([], None, tokenizer, max_length), targets, np.zeros(0, dtype=np.float32))
        store = tokenize(rows, tokenizer, max_length, cache_dir=cache_folder())
        return Examples(rows, store, targets, self.weights(targets), counts=self.label_counts(targets))

    def label_counts(self, targets: np.ndarray) -> dict[str, int]:
        """How many targets there are of each label; empty where labels cannot be counted."""
        if len(self.labels) != self.outputs or (targets.dtype.kind == "f" and targets.ndim == 1):
            return {}
        counts = targets.sum(axis=0) if targets.ndim == 2 else np.bincount(targets, minlength=len(self.labels))
        return {label: int(n) for label, n in zip(self.labels, counts, strict=True)}

    def draw(self, examples: Examples, units: np.ndarray, seed: Sequence[int]) -> tuple[Examples, np.ndarray]:
        """The units as they are learned from this time: themselves, unless a task draws anew each time (masks).

        What is drawn depends on `seed` and the units alone.
        """
        return examples, units

    def targets_of(self, examples: Examples, sequences: np.ndarray) -> np.ndarray:
        """Targets of the sequences in a batch, for `batch_loss`."""
        assert examples.targets is not None
        return examples.targets[sequences]

    def batch_loss(self, logits: Any, targets: Tensor, weights: Tensor, lengths: Sequence[int]) -> Tensor:
        """`loss` of a packed batch, whose sequences have `lengths` tokens. Shape: weights [B]."""
        return self.loss(logits, targets, weights)

    def attach(self, model: Any) -> None:
        """Add parameters of the task's own to a model that is to be trained, as a module of it."""
        return None

    def score(self, metrics: Metrics, examples: Examples, sequences: np.ndarray, outputs: Outputs) -> None:
        """Add the outputs of whole rows to the metrics. `outputs`: one array a sequence."""
        metrics.update(np.asarray(outputs), self.targets_of(examples, sequences))

    def tune(self, metrics: Metrics) -> bool:
        """Set what is tuned on the dev rows, from their metrics; whether anything was."""
        return False

    def answers(self, examples: Examples, outputs: Outputs) -> list[Prediction]:
        """One answer a row, from the outputs of all sequences of `examples`."""
        return self.decode(np.asarray(outputs)) if len(outputs) else []

    def answer(self, prediction: Prediction, top_k: int | None) -> dict[str, Any]:
        """A prediction as JSON, for `predict` and over HTTP."""
        found: dict[str, Any] = {"label": prediction.label}
        if isinstance(prediction.label, tuple):
            found["label"] = list(prediction.label)
        elif prediction.scores:
            found["score"] = prediction.scores.get(str(prediction.label))
        return found | ({"scores": prediction.top(top_k)} if prediction.scores else {}) | dict(prediction.extra)

    def shown(self, prediction: Prediction) -> str:
        """A prediction in one line, for a table."""
        label = prediction.label
        if isinstance(label, tuple):
            return ", ".join(label) or "(none)"
        return figure(label) if isinstance(label, float) else label

    def cell(self, prediction: Prediction, separator: str) -> str:
        """What a prediction says in a cell of csv, from which nothing is lost. `separator`: between labels."""
        label = prediction.label
        return separator.join(label) if isinstance(label, tuple) else str(label)

    def example_answer(self) -> dict[str, Any]:
        """What an answer looks like, for the server's documentation."""
        scores = dict(zip(self.labels, (0.86, 0.11, 0.03), strict=False))
        return {"label": self.labels[0], "score": 0.86, "scores": scores}

    def worst_rows(
        self, examples: Examples, sequences: np.ndarray, outputs: Outputs, keep: int
    ) -> list[tuple[float, int, tuple[str, str]]]:
        """For the report, of the rows that are most wrong: how wrong, the row's number, what was expected and what was
        predicted."""
        logits, targets = np.asarray(outputs), self.targets_of(examples, sequences)
        losses = self.worst(logits, targets)
        most = np.argsort(-losses, kind="stable")[:keep]
        told = zip(most, self.decode(logits[most]), strict=True)
        return [
            (float(losses[i]), int(sequences[i]), (self.describe(targets[i]), self._brief(answer)))
            for i, answer in told
        ]

    def _brief(self, answer: Prediction) -> str:
        return f"{answer.label:.4g}" if isinstance(answer.label, float) else self.shown(answer)

    def worst(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """How wrong each row is, [B] float32: its loss in plain numpy, for the report's list of worst errors."""
        raise NotImplementedError

    def describe(self, target: Any) -> str:
        """A target as a person reads it."""
        return str(target)


def ranked(labels: Sequence[str], scores: np.ndarray) -> dict[str, float]:
    """Scores [C] by label name, highest first."""
    return {labels[i]: float(scores[i]) for i in np.argsort(-scores, kind="stable")}
