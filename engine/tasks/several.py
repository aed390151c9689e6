"""Several tasks over one encoder: every head reads the same pass, their logits stand side by side.

Trained together (`tasks:` in a configuration), or put together from heads on one frozen encoder
(`regraft export A B --to BUNDLE`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from regraft.engine.data.rows import Rows
from regraft.engine.errors import ConfigError, DataError, nearest
from regraft.engine.examples import Examples
from regraft.engine.tasks.base import FIRST, TOKENS, Metrics, Outputs, Prediction, Task

if TYPE_CHECKING:
    from regraft.engine.config import DataConfig, TaskConfig
    from regraft.engine.data.fast_tokenizer import FastTokenizer

COMBINED = "mean"


class Several(Task):
    """`tasks` by name, in the order of their columns.

    `pairs`: of a task that reads plain texts, whether it reads pairs of them; where that is not known, it answers both.
    Where all heads read the first row of a sequence, so does the whole; else logits stand at all tokens, and those of a
    first row are repeated along its sequence.
    """

    type = "several"
    labels = ()
    metric = COMBINED
    metrics_known = (COMBINED,)

    def __init__(self, tasks: Mapping[str, Task], pairs: Mapping[str, bool] | None = None) -> None:
        self.tasks = dict(tasks)
        self.pairs = dict(pairs or {})
        self.reads = FIRST if all(task.reads == FIRST for task in self.tasks.values()) else TOKENS
        ends = np.cumsum([task.outputs for task in self.tasks.values()]).tolist()
        self.columns = {n: slice(e - t.outputs, e) for (n, t), e in zip(self.tasks.items(), ends, strict=True)}
        self.loss_weights: dict[str, float] = {}
        self.uncertain = False  # whether the weight of each loss is learned

    @classmethod
    def from_rows(cls, config: TaskConfig, train: Rows, label_column: str | int) -> Several:
        raise ConfigError("task.type: several tasks are listed by name under `tasks`, each with its data")

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Several:
        from regraft.engine.tasks import task_from_spec

        return cls({name: task_from_spec(own) for name, own in spec["tasks"].items()}, spec.get("pairs"))

    def spec(self) -> dict[str, Any]:
        found = {"type": self.type, "tasks": {name: task.spec() for name, task in self.tasks.items()}}
        return found | ({"pairs": self.pairs} if self.pairs else {})

    @property
    def outputs(self) -> int:
        return sum(task.outputs for task in self.tasks.values())

    def named(self, name: str) -> Task:
        """The task of that name. Raises ConfigError with the nearest one."""
        if name not in self.tasks:
            raise ConfigError(f"no task {name!r} here{nearest(name, self.tasks)}; there are {', '.join(self.tasks)}")
        return self.tasks[name]

    def attach(self, model: Any) -> None:
        for head, task in zip(model.heads, self.tasks.values(), strict=True):
            task.attach(head)
        if self.uncertain:
            model.add_log_variances()

    def own(self, name: str, output: np.ndarray) -> np.ndarray:
        """One task's logits in a sequence's output [C], or [L, C] where logits stand at tokens."""
        if self.reads == FIRST or self.tasks[name].reads == TOKENS:
            return output[..., self.columns[name]]
        return output[0, self.columns[name]]

    # -- judging: of rows that stand side by side (`several.mixed`) ----------------------------------------------------

    def encode(self, rows: Rows, label_column: str | int = "label", unknown: str = "error") -> NoReturn:
        raise ConfigError("several tasks have no one label a row; name one of them")

    def batch_loss(self, logits: Any, targets: Any, weights: Any, lengths: Any) -> NoReturn:
        self.loss(logits, targets, weights)

    def loss(self, logits: Any, targets: Any, weights: Any) -> NoReturn:
        raise NotImplementedError("each step is of one of the tasks: several.step")

    def metrics(self) -> Metrics:
        return SeveralMetrics(self)

    def score(self, metrics: Metrics, examples: Any, sequences: np.ndarray, outputs: Outputs) -> None:
        assert isinstance(metrics, SeveralMetrics)
        for name, part, numbers, places in examples.by_task(sequences):
            own = [self.own(name, outputs[place]) for place in places]
            self.tasks[name].score(metrics.of(name), part, numbers, own)

    def tune(self, metrics: Metrics) -> bool:
        assert isinstance(metrics, SeveralMetrics)
        tuned = [self.tasks[name].tune(part) for name, part in metrics.parts.items()]  # each, not up to the first
        return any(tuned)

    def worst_rows(
        self, examples: Any, sequences: np.ndarray, outputs: Outputs, keep: int
    ) -> list[tuple[float, int, tuple[str, str]]]:
        found = []
        for name, part, numbers, places in examples.by_task(sequences):
            own = [self.own(name, outputs[place]) for place in places]
            worst = self.tasks[name].worst_rows(part, numbers, own, keep)
            found += [(loss, row + examples.first_row[name], told) for loss, row, told in worst]
        return found

    # -- answering: every task that reads such an input, or those that are asked for -----------------------------------

    def take(self, item: Mapping[str, Any]) -> tuple[str, Any]:  # type: ignore[override]
        """Text, and what each task that answers makes of the object. `tasks` in it names those that are asked."""
        from regraft.engine.several.asked import take

        return take(self, item)

    def beside(self, text: str, other: Any) -> dict[str, Any]:  # type: ignore[override]
        from regraft.engine.several.asked import Asked

        if not isinstance(other, Asked):
            return super().beside(text, other)
        found: dict[str, Any] = {}
        for name, (own_text, own_other) in other.inputs.items():
            found |= self.tasks[name].beside(own_text, own_other)
        return found

    def inputs(self, source: Any, data: DataConfig, dropped: dict[str, int]) -> Iterator[tuple[str, Any]]:  # type: ignore[override]
        """Lines of texts, or of JSON objects as in requests."""
        from regraft.engine.several.asked import lines

        if isinstance(source, str):
            raise DataError(
                f"{source}: its columns are those of one task; name it with --task: {', '.join(self.tasks)}"
            )
        return lines(self, source, data, dropped)

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
        from regraft.engine.several.asked import examples_of

        if labelled:
            self.encode(rows, label_column, unknown)
        return examples_of(self, rows, tokenizer, max_length)

    def answers(self, examples: Examples, outputs: Outputs) -> list[Prediction]:
        from regraft.engine.several.asked import AskedExamples

        assert isinstance(examples, AskedExamples)
        found: list[dict[str, Prediction]] = [{} for _ in range(len(examples.rows))]
        for part in examples.asked:
            own = [self.own(part.task, outputs[place]) for place in part.places]
            answered = self.tasks[part.task].answers(part.examples, own)
            for row, prediction in zip(part.rows, answered, strict=True):
                found[row][part.task] = prediction
        return [self._joined(each) for each in found]

    def decode(self, logits: np.ndarray) -> list[Prediction]:
        """One answer a text; its `extra` holds each head's prediction by name. Shape: [B, sum of all C]."""
        each = [task.decode(logits[:, self.columns[name]]) for name, task in self.tasks.items()]
        return [self._joined(dict(zip(self.tasks, row, strict=True))) for row in zip(*each, strict=True)]

    def _joined(self, predictions: Mapping[str, Prediction]) -> Prediction:
        in_order = {name: predictions[name] for name in self.tasks if name in predictions}
        label = "; ".join(f"{name}: {self.tasks[name].shown(p)}" for name, p in in_order.items())
        return Prediction(label, {}, extra=in_order)

    def answer(self, prediction: Prediction, top_k: int | None) -> dict[str, Any]:
        found = {name: self.tasks[name].answer(p, top_k) for name, p in prediction.extra.items()}
        return {"label": prediction.label, "tasks": found}

    def example_answer(self) -> dict[str, Any]:
        return {"tasks": {name: task.example_answer() for name, task in self.tasks.items()}}


class SeveralMetrics(Metrics):
    """Each task's own metrics, of the tasks that had rows; `mean` of their main figures picks the best checkpoint."""

    def __init__(self, task: Several) -> None:
        self.task = task
        self.parts: dict[str, Metrics] = {}

    def of(self, name: str) -> Metrics:
        if name not in self.parts:
            self.parts[name] = self.task.tasks[name].metrics()
        return self.parts[name]

    def update(self, logits: np.ndarray, targets: np.ndarray) -> NoReturn:
        raise NotImplementedError("rows are of one task or another: Several.score")

    def state(self) -> Any:
        return {name: part.state() for name, part in self.parts.items()}

    def merge(self, state: Any) -> None:
        for name, own in state.items():
            self.of(name).merge(own)

    def compute(self) -> dict[str, float]:
        """`mean`, each task's main figure, and all others; those of a task as `task/figure`."""
        each = {name: self.parts[name].compute() for name in self._known()}
        main = {f"{name}/{self.task.tasks[name].metric}": f[self.task.tasks[name].metric] for name, f in each.items()}
        rest = {f"{name}/{key}": value for name, found in each.items() for key, value in found.items()}
        return {COMBINED: float(np.mean(list(main.values())))} | main | rest

    def details(self) -> dict[str, Any]:
        return {"tasks": {name: self._told(name) for name in self._known()}}

    def _told(self, name: str) -> dict[str, Any]:
        task, part = self.task.tasks[name], self.parts[name]
        return {"type": task.type, "metric": task.metric, "metrics": part.compute(), "details": part.details()}

    def _known(self) -> Iterable[str]:
        return [name for name in self.task.tasks if name in self.parts]
