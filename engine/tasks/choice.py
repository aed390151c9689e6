"""Multiple choice: which of a few texts goes with a text. Each choice is a sequence of its own, scored by one logit;
a softmax over the choices of a row decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.engine.data.cells import parse_json_line, refuse_halves
from regraft.engine.data.read import stream_items, text_lines
from regraft.engine.data.rows import Rows
from regraft.engine.data.source import find_source, open_lines
from regraft.engine.data.tokens import encode_counted
from regraft.engine.errors import ConfigError, DataError, at, nearest
from regraft.engine.examples import Examples
from regraft.engine.tasks.base import Metrics, Outputs, Prediction, Task
from regraft.engine.tasks.classification import softmax

if TYPE_CHECKING:
    from torch import Tensor

    from regraft.engine.config import DataConfig, TaskConfig
    from regraft.engine.data.fast_tokenizer import FastTokenizer


class Choice(Task):
    type = "choice"
    labels = ("score",)
    metrics_known = ("accuracy", "loss")

    def __init__(self, *, metric: str | None = None) -> None:
        self.metric = metric or "accuracy"
        if self.metric not in self.metrics_known:
            raise ConfigError(f"task.metric: {metric!r} is not a figure of choice: {', '.join(self.metrics_known)}")

    @classmethod
    def read(
        cls, path: str, data: DataConfig, *, split: str, need_labels: bool = True, limit: int | None = None
    ) -> Rows:
        return read_choices(path, data, split=split, need_labels=need_labels, limit=limit)

    @classmethod
    def inputs(cls, source: Any, data: DataConfig, dropped: dict[str, int]) -> Iterator[tuple[str, Any]]:
        if isinstance(source, str):
            rows = cls.read(source, data, split="predict", need_labels=False)
            dropped.update(rows.dropped)
            return zip(rows.texts, rows.pairs or (), strict=True)
        columns = data.columns
        names = {"text": str(columns.text), "choices": str(columns.text_pair or "choices")}
        return stream_items(
            text_lines(source, data.encoding, one_text=False),
            lambda item: cls.take({k: item.get(n, item.get(k)) for k, n in names.items()}),
        )

    @classmethod
    def take(cls, item: Mapping[str, Any]) -> tuple[str, Any]:
        if not isinstance(item.get("text"), str):
            raise ValueError("text: expected a text" if item.get("text") is not None else "text: field required")
        choices = item.get("choices")
        if not isinstance(choices, list | tuple) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
            raise ValueError("choices: expected a list of at least two texts")
        return item["text"], tuple(choices)

    @classmethod
    def beside(cls, text: str, other: Any) -> dict[str, Any]:
        return {}  # an answer lists the choices itself

    @classmethod
    def from_rows(cls, config: TaskConfig, train: Rows, label_column: str | int) -> Choice:
        return cls(metric=config.metric)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Choice:
        return cls(metric=spec["metric"])

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
        return np.array(rows.labels, dtype=np.int64), np.arange(len(rows))

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
        if rows.pairs is None or any(isinstance(choices, str) or not choices for choices in rows.pairs):
            raise DataError(f"{rows.path}: expected choices beside the text")
        sizes = np.array([len(choices) for choices in rows.pairs], dtype=np.int64)
        row_of = np.repeat(np.arange(len(rows)), sizes)
        texts = [rows.texts[r] for r in row_of.tolist()]
        store, cuts = encode_counted(texts, [c for choices in rows.pairs for c in choices], tokenizer, max_length)
        groups = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        targets = None
        weights = np.ones(len(store), dtype=np.float32)
        if labelled:
            right, _ = self.encode(rows, label_column, unknown)
            # Of each sequence: whether it is the right one, and which row it is of.
            chosen = np.zeros(len(store), dtype=np.int64)
            chosen[groups[:-1] + right] = 1
            targets = np.stack([chosen, row_of], axis=1)
            weights = chosen.astype(np.float32)  # a row counts once
        return Examples(rows, store, targets, weights, row_of=row_of, groups=groups, cuts=cuts)

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Cross-entropy over each row's choices. Shape: logits [B, 1], targets [B, 2], weights [B]."""
        import torch

        scores = logits.float().squeeze(-1)
        row = torch.unique_consecutive(targets[:, 1], return_inverse=True)[1]
        rows = int(row[-1]) + 1
        top = scores.new_full((rows,), float("-inf")).scatter_reduce(0, row, scores.detach(), "amax")
        total = scores.new_zeros(rows).index_add(0, row, (scores - top[row]).exp())
        return ((total.log() + top)[row] - scores).mul(weights).sum()

    def metrics(self) -> Metrics:
        return ChoiceMetrics()

    def _rows(self, examples: Examples, sequences: np.ndarray, outputs: Outputs) -> list[tuple[int, np.ndarray]]:
        """Row and its choices' logits."""
        assert examples.row_of is not None
        owner = examples.row_of[sequences]
        flat = np.asarray(outputs, dtype=np.float64).reshape(len(sequences))
        return [(int(row), flat[owner == row]) for row in dict.fromkeys(owner.tolist())]

    def score(self, metrics: Metrics, examples: Examples, sequences: np.ndarray, outputs: Outputs) -> None:
        for row, logits in self._rows(examples, sequences, outputs):
            metrics.update(logits[None], np.array([examples.rows.labels[row]]))  # type: ignore[index]

    def decode(self, logits: np.ndarray) -> list[Prediction]:
        raise NotImplementedError("an answer needs its choices: answers")

    def answers(self, examples: Examples, outputs: Outputs) -> list[Prediction]:
        rows = self._rows(examples, np.arange(len(examples.store)), outputs)
        return [self._answer(examples.rows.pairs[row], logits) for row, logits in rows]  # type: ignore[index]

    def _answer(self, choices: Sequence[str], logits: np.ndarray) -> Prediction:
        chances = softmax(logits[None])[0]
        best = int(chances.argmax())
        told = [{"text": text, "score": float(p)} for text, p in zip(choices, chances, strict=True)]
        return Prediction(choices[best], {}, (), {"index": best, "score": float(chances[best]), "choices": told})

    def example_answer(self) -> dict[str, Any]:
        return {"label": "It fell.", "index": 1, "score": 0.8, "choices": [{"text": "It fell.", "score": 0.8}]}

    def worst_rows(
        self, examples: Examples, sequences: np.ndarray, outputs: Outputs, keep: int
    ) -> list[tuple[float, int, tuple[str, str]]]:
        found = []
        for row, logits in self._rows(examples, sequences, outputs):
            choices, right = examples.rows.pairs[row], examples.rows.labels[row]  # type: ignore[index]
            loss = float(-np.log(max(softmax(logits[None])[0, right], 1e-30)))
            found.append((loss, row, (choices[right], choices[int(logits.argmax())])))
        return sorted(found, key=lambda f: -f[0])[:keep]


class ChoiceMetrics(Metrics):
    """Adds up rows, right ones and losses."""

    def __init__(self) -> None:
        self.sums = np.zeros(3)

    def update(self, logits: np.ndarray, targets: np.ndarray) -> None:
        p = softmax(logits)
        right = p[np.arange(len(targets)), targets]
        self.sums += [len(targets), (p.argmax(axis=-1) == targets).sum(), -np.log(np.maximum(right, 1e-30)).sum()]

    def state(self) -> Any:
        return self.sums

    def merge(self, state: Any) -> None:
        self.sums = self.sums + state

    def compute(self) -> dict[str, float]:
        rows = max(self.sums[0], 1.0)
        return {"accuracy": float(self.sums[1] / rows), "loss": float(self.sums[2] / rows)}


def read_choices(path: str, data: DataConfig, *, split: str, need_labels: bool, limit: int | None) -> Rows:
    """Rows of a jsonl file: text, choices and the right one's number from 0, or its text. Raises DataError."""
    column = data.columns
    names = (str(column.text), str(column.text_pair or "choices"), str(column.label))
    texts: list[str] = []
    beside: list[tuple[str, ...]] = []
    labels: list[int | None] = []
    lines: list[int] = []
    with open_lines(find_source(path, data), newline="\n") as content:
        for number, line in enumerate(content, 1):
            if line.isspace() or (limit is not None and len(texts) >= limit):
                continue
            place = at(path, number)
            values = parse_json_line(line, str(path), number)
            refuse_halves(line, [values.get(name) for name in names], place)
            for name in names[: 3 if need_labels else 2]:
                if name not in values:
                    raise DataError(
                        f"{place}: there is no key {name!r}{nearest(name, values)}, only {', '.join(values)}"
                    )
            try:
                text, choices = Choice.take({"text": values[names[0]], "choices": values[names[1]]})
            except ValueError as error:
                raise DataError(f"{place}: {error}") from None
            texts.append(text)
            beside.append(choices)
            labels.append(_number(values.get(names[2]), choices, place, need_labels))
            lines.append(number)
    if not texts:
        raise DataError(f"{path}: no rows")
    known = None if None in labels else labels
    return Rows(split, str(path), texts, known, np.array(lines, dtype=np.int64), pairs=beside)


def _number(label: Any, choices: Sequence[str], place: str, needed: bool) -> int | None:
    if label in choices:
        return choices.index(label)
    number = int(label) if isinstance(label, str) and label.isdecimal() else label
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(choices):
        return number
    if label is None and not needed:
        return None
    raise DataError(f"{place}: the label {label!r} is neither a choice nor its number, 0 to {len(choices) - 1}")
