"""Extractive question answering: the part of a context that answers a question, or that none does.

Start and end are classes over the tokens of a window; a window without the answer points at its first token. Long
contexts are read in windows that share tokens, and the best span of all windows answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.engine.data.rows import Rows
from regraft.engine.data.squad import Answers, locate, read_questions
from regraft.engine.errors import ConfigError, DataError
from regraft.engine.examples import Examples
from regraft.engine.tasks.base import TOKENS, Metrics, Outputs, Prediction, Span, Task
from regraft.engine.tasks.classification import softmax
from regraft.engine.tasks.squad_metrics import AnswerMetrics, judge
from regraft.engine.tasks.windows import Pieces, StoreBuilder, best_window, pieces_of, template, windows

if TYPE_CHECKING:
    from torch import Tensor

    from regraft.engine.config import DataConfig, TaskConfig
    from regraft.engine.data.fast_tokenizer import FastTokenizer

LONGEST_QUESTION = 64  # tokens
CANDIDATES = 20  # starts, and ends, that are combined in each window
STRIDE = 128
MOVED, ABSENT = "answers not at their offset", "answers nowhere in the context"


class Answering(Task):
    type = "answering"
    reads = TOKENS
    auto_model = "AutoModelForQuestionAnswering"
    labels = ()
    metrics_known = ("f1", "exact_match")
    remarks = (MOVED, ABSENT)

    def __init__(
        self,
        *,
        no_answer: bool = False,
        threshold: float = 0.0,
        rule: str = "english",
        stride: int | None = None,
        max_answer: int = 30,
        n_best: int = 5,
        metric: str | None = None,
    ) -> None:
        self.no_answer, self.threshold, self.rule = no_answer, threshold, rule
        self.stride, self.max_answer, self.n_best = stride, max_answer, n_best
        self.metric = metric or "f1"
        if self.metric not in self.metrics_known:
            raise ConfigError(f"task.metric: {metric!r} is not a figure of answering: {', '.join(self.metrics_known)}")

    @classmethod
    def read(
        cls, path: str, data: DataConfig, *, split: str, need_labels: bool = True, limit: int | None = None
    ) -> Rows:
        return read_questions(path, data, split=split, need_labels=need_labels, limit=limit)

    @classmethod
    def inputs(cls, source: Any, data: DataConfig, dropped: dict[str, int]) -> Iterator[tuple[str, Any]]:
        if isinstance(source, str):
            rows = cls.read(source, data, split="predict", need_labels=False)
            dropped.update(rows.dropped)
            return zip(rows.texts, rows.pairs or (), strict=True)
        columns = data.columns.model_copy(update={"text": "question", "text_pair": "context", "label": "answers"})
        return super().inputs(source, data.model_copy(update={"columns": columns}), dropped)

    @classmethod
    def take(cls, item: Mapping[str, Any]) -> tuple[str, Any]:
        names = ("question", "context") if "text" not in item else ("text", "text_pair")
        for name in names:
            if not isinstance(item.get(name), str) or not item[name].strip():
                raise ValueError(f"{name}: {'expected a text' if name in item else 'field required'}")
        return item[names[0]], item[names[1]]

    @classmethod
    def from_rows(cls, config: TaskConfig, train: Rows, label_column: str | int) -> Answering:
        if train.labels is None:
            raise DataError(f"{train.path}: there are no answers to learn from")
        sample = "".join((train.pairs or [])[:200])
        han = sum("\u4e00" <= c <= "\u9fff" for c in sample) > 0.2 * len(sample)
        return cls(
            no_answer=any(not answers.texts for answers in train.labels),
            rule=("chinese" if han else "english") if config.normalise == "auto" else config.normalise,
            stride=config.stride,
            max_answer=config.max_answer,
            n_best=config.n_best,
            metric=config.metric,
        )

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Answering:
        known = ("no_answer", "threshold", "rule", "stride", "max_answer", "n_best", "metric")
        return cls(**{key: spec[key] for key in known})

    def spec(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "labels": [],
            "no_answer": self.no_answer,
            "threshold": self.threshold,
            "rule": self.rule,
            "stride": self.stride,
            "max_answer": self.max_answer,
            "n_best": self.n_best,
            "metric": self.metric,
        }

    @property
    def outputs(self) -> int:
        return 2

    # -- rows to windows -----------------------------------------------------------------------------------------------

    def encode(
        self, rows: Rows, label_column: str | int = "label", unknown: str = "error"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Characters where each question's first answer begins and ends, [N, 2] int64, -1 for none that stands in the
        context; and the rows kept: in train, those whose answer does, or that have none."""
        if rows.labels is None:
            raise DataError(f"{rows.path}: there are no answers")
        found = np.full((len(rows), 2), -1, dtype=np.int64)
        kept = np.ones(len(rows), dtype=bool)
        for i, answers in enumerate(rows.labels):
            if not answers.texts:
                continue
            context = (rows.pairs or [])[i]
            placed = [(locate(context, t, s), t) for t, s in zip(answers.texts, answers.starts, strict=True)]
            good = next(((s, t) for s, t in placed if s is not None), None)
            if good is not None:
                found[i] = good[0], good[0] + len(good[1])
            elif rows.split == "train":
                kept[i] = False
                if unknown == "error" and not context.strip():
                    raise DataError(f"{rows.where(i)}: the context is empty")
        where = np.flatnonzero(kept)
        return found[where], where

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
        if rows.pairs is None or any(not isinstance(context, str) for context in rows.pairs):
            raise DataError(f"{rows.path}: a question needs a context: give both, as question and context")
        spans = None
        if labelled:
            spans, kept = self.encode(rows, label_column, unknown)
            if len(kept) < len(rows):
                lost = len(rows) - len(kept)
                rows = rows.take(kept, dropped={**rows.dropped, "answer_not_in_context": lost})
        beside = list(rows.pairs or ())
        contexts = list(dict.fromkeys(beside))
        tokens = dict(zip(contexts, pieces_of(tokenizer, contexts), strict=True))
        shape = template(tokenizer, 2)
        builder = StoreBuilder(tokenizer)
        parts: dict[str, list[Any]] = {"row": [], "chars": [], "best": [], "target": []}
        cuts: list[int] = []
        for row, question in enumerate(pieces_of(tokenizer, rows.texts, rows.where)):
            most = min(LONGEST_QUESTION, (max_length - shape.tokens) // 2)
            span = None if spans is None else spans[row]
            self._add_windows(
                builder,
                parts,
                row,
                question.ids[:most],
                tokens[beside[row]],
                shape,
                max_length,
                span,
            )
            # A question's windows lose the same tokens; they count once. Of the context nothing is lost.
            cuts += [max(0, len(question.ids) - most), *[0] * (len(parts["row"]) - len(cuts) - 1)]
        return Examples(
            rows,
            builder.store(truncated=sum(cut > 0 for cut in cuts), cut_tokens=sum(cuts)),
            np.array(parts["target"], dtype=np.int64).reshape(-1, 2) if labelled else None,
            np.ones(len(parts["row"]), dtype=np.float32),
            row_of=np.array(parts["row"], dtype=np.int64),
            chars=np.concatenate(parts["chars"]) if parts["chars"] else np.zeros((0, 2), np.int32),
            words=np.concatenate(parts["best"]) if parts["best"] else np.zeros(0, np.int32),
            counts=_counts(rows) if labelled else {},
            cuts=np.array(cuts, dtype=np.int64),
        )

    def _add_windows(
        self,
        builder: StoreBuilder,
        parts: dict[str, list[Any]],
        row: int,
        question: np.ndarray,
        context: Pieces,
        shape: Any,
        max_length: int,
        span: np.ndarray | None,
    ) -> None:
        room = max_length - shape.tokens - len(question)
        overlap = min(STRIDE, room // 2) if self.stride is None else self.stride
        cuts = windows(len(context.ids), room, overlap)
        best = best_window(cuts, len(context.ids))
        for number, (start, end) in enumerate(cuts):
            ids, types, places = shape.sequence(question, context.ids[start:end])
            inside = places >= len(question)
            chars = np.full((len(ids), 2), -1, dtype=np.int32)
            chars[inside] = context.chars[start:end]
            shown_best = np.full(len(ids), -1, dtype=np.int32)
            shown_best[inside] = best[start:end] == number
            builder.add(ids, types)
            parts["row"].append(row)
            parts["chars"].append(chars)
            parts["best"].append(shown_best)
            if span is not None:
                parts["target"].append(_target(chars, span))

    # -- loss ----------------------------------------------------------------------------------------------------------

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError("a softmax needs to know where windows end: batch_loss")

    def batch_loss(self, logits: Any, targets: Tensor, weights: Tensor, lengths: Sequence[int]) -> Tensor:
        """Mean of start's and end's cross-entropy over the tokens of each window, summed. logits [T, 2], targets [B, 2]."""
        import torch

        sizes = torch.as_tensor(lengths, device=logits.device)
        inside = torch.arange(max(lengths), device=logits.device)[None] < sizes[:, None]
        cells = logits.new_full((len(lengths), max(lengths), 2), float("-inf"), dtype=torch.float32)
        cells = cells.masked_scatter(inside[..., None], logits.float())
        right = cells.gather(1, targets[:, None, :]).squeeze(1)
        return ((cells.logsumexp(dim=1) - right).mean(dim=-1) * weights).sum()

    # -- answers -------------------------------------------------------------------------------------------------------

    def metrics(self) -> Metrics:
        return AnswerMetrics(self.threshold if self.no_answer else None)

    def tune(self, metrics: Metrics) -> bool:
        if not self.no_answer:
            return False
        assert isinstance(metrics, AnswerMetrics)
        self.threshold = metrics.tuned_threshold()
        return True

    def _best(self, examples: Examples, sequences: np.ndarray, outputs: Outputs) -> dict[int, tuple[list, float]]:
        """By row: the best spans (start and end character, logit), best first, and the logit of no answer."""
        assert examples.row_of is not None
        found: dict[int, tuple[list, float]] = {}
        for sequence, logits in zip(sequences, outputs, strict=True):
            row = int(examples.row_of[sequence])
            spans, none = found.get(row, ([], float("inf")))
            found[row] = spans + self._window_best(examples, sequence, logits), min(none, float(logits[0].sum()))
        ranked = {}
        for row, (spans, none) in found.items():
            once: dict[tuple[int, int], float] = {}
            for start, end, score in sorted(spans, key=lambda s: -s[2]):
                once.setdefault((start, end), score)
            ranked[row] = [(a, b, score) for (a, b), score in list(once.items())[: self.n_best]], none
        return ranked

    def _window_best(self, examples: Examples, sequence: int, logits: np.ndarray) -> list[tuple[int, int, float]]:
        assert examples.chars is not None and examples.words is not None
        span = slice(examples.store.offsets[sequence], examples.store.offsets[sequence + 1])
        chars, best = examples.chars[span], examples.words[span]
        real = chars[:, 1] > chars[:, 0]
        starts = np.flatnonzero(real & (best == 1))
        ends = np.flatnonzero(real)
        if not len(starts):
            return []
        starts = starts[np.argsort(-logits[starts, 0], kind="stable")[:CANDIDATES]]
        ends = ends[np.argsort(-logits[ends, 1], kind="stable")[:CANDIDATES]]
        scores = logits[starts, 0][:, None] + logits[ends, 1][None]
        length = ends[None] - starts[:, None] + 1
        scores = np.where((length >= 1) & (length <= self.max_answer), scores, -np.inf)
        order = np.argsort(-scores, axis=None, kind="stable")[: self.n_best]
        picked = [
            (starts[i], ends[j], scores[i, j]) for i, j in zip(*np.unravel_index(order, scores.shape), strict=True)
        ]
        return [(int(chars[i, 0]), int(chars[j, 1]), float(s)) for i, j, s in picked if np.isfinite(s)]

    def score(self, metrics: Metrics, examples: Examples, sequences: np.ndarray, outputs: Outputs) -> None:
        assert isinstance(metrics, AnswerMetrics)
        for row, (spans, none) in self._best(examples, sequences, outputs).items():
            context, gold = examples.rows.pairs[row], examples.rows.labels[row].texts  # type: ignore[index]
            text = context[spans[0][0] : spans[0][1]] if spans else ""
            margin = none - spans[0][2] if spans else float("inf")
            metrics.add(margin, *judge(self.rule, text, gold), not gold)

    def decode(self, logits: np.ndarray) -> list[Prediction]:
        raise NotImplementedError("an answer needs its context: answers")

    def answers(self, examples: Examples, outputs: Outputs) -> list[Prediction]:
        best = self._best(examples, np.arange(len(examples.store)), outputs)
        return [self._answer(examples.rows.pairs[row], *best[row]) for row in range(len(examples.rows))]  # type: ignore[index]

    def _answer(self, context: str, spans: list, none: float) -> Prediction:
        scores = np.array([s for _, _, s in spans] + ([none] if self.no_answer or not spans else []))
        chances = softmax(scores[None])[0]
        shown = tuple(
            Span(start, end, "answer", context[start:end], float(p))
            for (start, end, _), p in zip(spans, chances, strict=False)
        )
        silent = not spans or (self.no_answer and none - spans[0][2] > self.threshold)
        extra = {"no_answer_score": float(chances[-1])} if self.no_answer or not spans else {}
        return Prediction("" if silent else shown[0].text, {}, shown, extra)

    def answer(self, prediction: Prediction, top_k: int | None) -> dict[str, Any]:
        best = None if prediction.label == "" else prediction.spans[0]
        found: dict[str, Any] = {
            "answer": prediction.label,
            "start": best.start if best else None,
            "end": best.end if best else None,
            "score": best.score if best else prediction.extra.get("no_answer_score"),
        }
        candidates = [
            {"text": s.text, "start": s.start, "end": s.end, "score": s.score} for s in prediction.spans[:top_k]
        ]
        return found | dict(prediction.extra) | {"candidates": candidates}

    def shown(self, prediction: Prediction) -> str:
        return str(prediction.label) or "(no answer)"

    def example_answer(self) -> dict[str, Any]:
        best = {"start": 12, "end": 17, "score": 0.91}
        return {"answer": "Paris", **best, "candidates": [{"text": "Paris", **best}]}

    def worst_rows(
        self, examples: Examples, sequences: np.ndarray, outputs: Outputs, keep: int
    ) -> list[tuple[float, int, tuple[str, str]]]:
        told = []
        for row, (spans, none) in self._best(examples, sequences, outputs).items():
            context, gold = examples.rows.pairs[row], examples.rows.labels[row].texts  # type: ignore[index]
            answer = self._answer(context, spans, none)
            _, f1 = judge(self.rule, str(answer.label), gold)
            sure = answer.spans[0].score if answer.spans else 0.0
            told.append((1.0 - f1 + sure * (f1 < 1), row, (gold[0] if gold else "(no answer)", self.shown(answer))))
        return sorted(told, key=lambda t: -t[0])[:keep]


def _target(chars: np.ndarray, span: np.ndarray) -> tuple[int, int]:
    """First and last token of the answer in a window; the window's first token where it is not all there."""
    if span[0] < 0:
        return 0, 0
    real = np.flatnonzero(chars[:, 1] > chars[:, 0])
    if not len(real) or chars[real[0], 0] > span[0] or chars[real[-1], 1] < span[1]:
        return 0, 0
    within = real[(chars[real, 1] > span[0]) & (chars[real, 0] < span[1])]
    return (int(within[0]), int(within[-1])) if len(within) else (0, 0)


def _counts(rows: Rows) -> dict[str, int]:
    """Questions with and without answer, and answers whose offset is wrong."""
    found = {"answerable": 0, "no answer": 0}
    moved = absent = 0
    for answers, context in zip(rows.labels or (), rows.pairs or (), strict=True):
        assert isinstance(answers, Answers)
        found["answerable" if answers.texts else "no answer"] += 1
        for text, start in zip(answers.texts, answers.starts, strict=True):
            if context[max(start, 0) : max(start, 0) + len(text)] != text:
                moved += 1
                absent += text not in context
    if moved:
        found |= {MOVED: moved, ABSENT: absent}
    return found
