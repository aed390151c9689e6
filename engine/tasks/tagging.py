"""A tag for every word, and the spans that tags spell: entities, chunks, parts of speech, characters.

The head is linear (softmax a word) or a linear-chain CRF. Long texts are read in overlapping windows; each word is
judged in the window that shows most of what is around it, in training as in answering.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.engine.data.cells import parse_json_line
from regraft.engine.data.read import STDIN, stream_items, stream_rows, text_lines, with_blank_texts
from regraft.engine.data.rows import Rows
from regraft.engine.data.source import is_plain_text
from regraft.engine.data.spans import COLUMNS, CharSpans, read_spans
from regraft.engine.errors import ConfigError, DataError, nearest
from regraft.engine.examples import Examples
from regraft.engine.tasks.base import TOKENS, Metrics, Outputs, Prediction, Span, Task
from regraft.engine.tasks.classification import softmax
from regraft.engine.tasks.crf import Crf
from regraft.engine.tasks.labels import in_order
from regraft.engine.tasks.schemes import Chunk, chunks, spell, strict_chunks, tag_names
from regraft.engine.tasks.span_metrics import SpanMetrics
from regraft.engine.tasks.windows import StoreBuilder, best_window, pieces_of, template, windows
from regraft.engine.tasks.words import Words, joined, words_of

if TYPE_CHECKING:
    from torch import Tensor

    from regraft.engine.config import DataConfig, TaskConfig
    from regraft.engine.data.fast_tokenizer import FastTokenizer

NO_TARGET = -100
ODD = "spans that do not fit words"
BEGINS, ENDS = 1, 2  # a window that holds the beginning, the end, of its text


class Tagging(Task):
    type = "tagging"
    reads = TOKENS
    auto_model = "AutoModelForTokenClassification"
    metrics_known = ("f1", "precision", "recall", "strict_f1", "macro_f1", "accuracy")
    remarks = (ODD,)

    def __init__(
        self,
        kinds: tuple[str, ...],
        *,
        tags: str = "iob2",
        written: str = "auto",
        crf: bool = False,
        scores: Sequence[Any] | None = None,
        alignment: str = "first",
        stride: int | None = None,
        label_smoothing: float = 0.0,
        metric: str | None = None,
    ) -> None:
        self.kinds, self.tags, self.alignment, self.stride = kinds, tags, alignment, stride
        self.written = written  # the scheme of the training rows' file
        self.labels = tag_names(kinds, tags)
        self.label_smoothing = label_smoothing
        self.crf = Crf(self.labels, tags, scores) if crf else None
        self.metric = metric or ("accuracy" if tags == "none" else "f1")
        if self.metric not in self.metrics_known:
            raise ConfigError(
                f"task.metric: {metric!r} is not a figure of a tagging task: {', '.join(self.metrics_known)}"
            )

    @classmethod
    def read(
        cls, path: str, data: DataConfig, *, split: str, need_labels: bool = True, limit: int | None = None
    ) -> Rows:
        return read_spans(path, data, split=split, need_labels=need_labels, limit=limit, scheme=data.tag_scheme)

    def like_training(self, data: DataConfig) -> DataConfig:
        # Which scheme marks its spans, a file shows. That each word's tag stands for itself, few rows may not show.
        plain = data.tag_scheme == "auto" and self.written == "none"
        return data.model_copy(update={"tag_scheme": "none"}) if plain else data

    @classmethod
    def inputs(cls, source: Any, data: DataConfig, dropped: dict[str, int]) -> Iterator[tuple[str, Any]]:
        if not isinstance(source, str):
            lines = text_lines(source, data.encoding, one_text=True)
            return cls._of_lines(lines, with_blank_texts(data), dropped)
        if is_plain_text(source, data):
            return super().inputs(source, data, dropped)
        rows = cls.read(source, data, split="predict", need_labels=False)
        dropped.update(rows.dropped)
        return iter([(rows.texts[i], rows.pairs[i] if rows.pairs else None) for i in range(len(rows))])

    @classmethod
    def _of_lines(
        cls, lines: Iterator[tuple[int, str]], data: DataConfig, dropped: dict[str, int]
    ) -> Iterator[tuple[str, Any]]:
        """Texts, objects with the columns of `data`, or {"words": [...]} as in a request."""
        for number, line in lines:
            item = parse_json_line(line, STDIN, number) if line.startswith("{") else {}
            if "words" in item and data.columns.text not in item:
                yield from stream_items([(number, line)], lambda item: cls.take({"words": item["words"]}))
            else:
                yield from ((row.text, row.pair) for row in stream_rows([(number, line)], data, dropped))

    @classmethod
    def take(cls, item: Mapping[str, Any]) -> tuple[str, Any]:
        if set(item) == {"words"}:
            words = item["words"]
            if not isinstance(words, list | tuple) or not words:
                raise ValueError("words: expected a list of words")
            if not all(isinstance(word, str) and word.strip() for word in words):
                raise ValueError("words: expected words that are not empty")
            return joined(words)
        if item.get("text_pair") is not None:
            raise ValueError("text_pair: this task takes one text")
        return super().take(item)

    @classmethod
    def beside(cls, text: str, other: Any) -> dict[str, Any]:
        return {} if other is None else {"words": [text[start:end] for start, end in other]}

    @classmethod
    def from_rows(cls, config: TaskConfig, train: Rows, label_column: str | int) -> Tagging:
        if train.labels is None:
            raise DataError(f"{train.path}: there are no tags or spans (column {label_column!r})")
        found = {kind for spans in train.labels for _, _, kind in spans}
        kinds = tuple(config.labels) if config.labels else in_order(found)
        if not kinds:
            raise DataError(f"{train.path}: none of the {len(train)} rows has a span; there is nothing to learn")
        tags = config.tags
        if tags == "auto":
            tags = "none" if _tags_every_word(train) else "iob2"
        return cls(
            kinds,
            tags=tags,
            written=train.scheme or "auto",
            crf=config.crf,
            alignment=config.alignment,
            stride=config.stride,
            label_smoothing=config.label_smoothing,
            metric=config.metric,
        )

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Tagging:
        known = {key: spec[key] for key in ("tags", "crf", "scores", "alignment", "stride", "metric")}
        return cls(tuple(spec["kinds"]), written=spec.get("written", "auto"), **known)

    def spec(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "kinds": list(self.kinds),
            "labels": list(self.labels),
            "tags": self.tags,
            "written": self.written,
            "crf": self.crf is not None,
            "scores": None if self.crf is None else [v.tolist() for v in self.crf.values()],
            "alignment": self.alignment,
            "stride": self.stride,
            "metric": self.metric,
        }

    @property
    def outputs(self) -> int:
        return len(self.labels)

    def attach(self, model: Any) -> None:
        if self.crf is not None:
            self.crf.attach(model)

    # -- rows to sequences ---------------------------------------------------------------------------------------------

    def words(self, rows: Rows, row: int) -> Words:
        """The words of a row: as its source gives them, or as its text shows them."""
        given = None if rows.pairs is None else rows.pairs[row]
        return words_of(rows.texts[row]) if given is None else given

    def encode(
        self, rows: Rows, label_column: str | int = "label", unknown: str = "error"
    ) -> tuple[np.ndarray, np.ndarray]:
        """One array of tag numbers a row ([words]), in an object array; and the rows kept."""
        if rows.labels is None:
            raise DataError(f"{rows.path}: there are no tags or spans (column {label_column!r})")
        targets: list[np.ndarray] = []
        kept: list[int] = []
        for row, spans in enumerate(rows.labels):
            strange = next((kind for _, _, kind in spans if kind not in self.kinds), None)
            if strange is None:
                targets.append(self._numbers(spans, self.words(rows, row))[0])
                kept.append(row)
            elif unknown == "error":
                raise DataError(
                    f"{rows.where(row, label_column)}: {strange!r} is not a label of the training data"
                    f"{nearest(strange, self.kinds)}; expected one of {', '.join(self.kinds[:20])}"
                )
        found = np.empty(len(targets), dtype=object)
        found[:] = targets
        return found, np.array(kept, dtype=np.int64)

    def _numbers(self, spans: CharSpans, words: Words, seen: np.ndarray | None = None) -> tuple[np.ndarray, int]:
        """The number of every word's tag, [words], and how many spans do not begin and end where words do.

        `seen`: the words that have tokens. Tags are spelled over these, so that a span goes on from one to the next.
        """
        number = {tag: i for i, tag in enumerate(self.labels)}
        covered, odd = covered_words(spans, words)
        tags = np.array([number.get(t, NO_TARGET) for t in spell(covered, len(words), self.tags)], dtype=np.int64)
        if seen is not None and len(seen) < len(words):
            tags[seen] = self._numbers(spans, tuple(words[i] for i in seen))[0]
        return tags, odd

    def weights(self, targets: np.ndarray) -> np.ndarray:
        return np.array([(t != NO_TARGET).sum() for t in targets], dtype=np.float32)

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
        if labelled:
            _, kept = self.encode(rows, label_column, unknown)
            if len(kept) < len(rows):
                rows = rows.take(kept, dropped={**rows.dropped, "unknown_label": len(rows) - len(kept)})
        shape = template(tokenizer)
        builder = StoreBuilder(tokenizer)
        row_of: list[int] = []
        words: list[np.ndarray] = []
        wanted: list[np.ndarray] = []
        odd = 0
        for row, pieces in enumerate(pieces_of(tokenizer, rows.texts, rows.where)):
            text_words = self.words(rows, row)
            owner = _word_of_token(pieces.chars, text_words)
            spans = windows(len(pieces.ids), max_length - shape.tokens, self.stride)
            best = best_window(spans, len(pieces.ids))
            first = np.flatnonzero((np.diff(owner, prepend=-1) != 0) & (owner >= 0))
            home = np.full(int(owner.max(initial=-1)) + 1, -1, dtype=np.int64)
            home[owner[first]] = best[first]  # the window that a word is judged in
            tags = np.zeros(0, dtype=np.int64)
            if labelled:
                tags, strange = self._numbers(rows.labels[row], text_words, np.unique(owner[first]))  # type: ignore[index]
                odd += strange
            for number, (start, end) in enumerate(spans):
                ids, types, places = shape.sequence(pieces.ids[start:end])
                mine = np.where(owner[start:end] >= 0, home[owner[start:end]] == number, False)
                word = np.full(len(ids), -1, dtype=np.int32)
                word[places >= 0] = np.where(mine, owner[start:end], -1)
                builder.add(ids, types)
                words.append(word)
                row_of.append(row)
                if labelled:
                    target = np.full(len(ids), NO_TARGET, dtype=np.int64)
                    begins = np.flatnonzero((np.diff(word, prepend=-1) != 0) & (word >= 0))
                    target[begins] = tags[word[begins]]
                    wanted.append(target)
        flat = np.concatenate(wanted) if wanted else None
        weights = np.array([(t != NO_TARGET).sum() for t in wanted] or [0.0] * len(row_of), dtype=np.float32)
        return Examples(
            rows,
            builder.store(),
            flat,
            weights,
            row_of=np.array(row_of, dtype=np.int64),
            words=np.concatenate(words) if words else np.zeros(0, dtype=np.int32),
            counts=self._counts(rows) | ({ODD: odd} if odd else {}) if labelled else {},
        )

    def _counts(self, rows: Rows) -> dict[str, int]:
        found = dict.fromkeys(self.kinds, 0)
        for spans in rows.labels or ():
            for _, _, kind in spans:
                found[kind] += 1
        return found

    # -- loss ----------------------------------------------------------------------------------------------------------

    def targets_of(self, examples: Examples, sequences: np.ndarray) -> np.ndarray:
        """[T, 2]: the tag that a word's first token is to get, and the word each token is of; for a CRF [T, 3], with
        BEGINS and ENDS of its window."""
        assert examples.targets is not None and examples.words is not None and examples.row_of is not None
        tokens = examples.tokens(sequences)
        columns = [examples.targets[tokens], examples.words[tokens].astype(np.int64)]
        if self.crf is not None:
            changes = np.concatenate([[True], np.diff(examples.row_of) != 0, [True]])
            edges = BEGINS * changes[sequences] + ENDS * changes[sequences + 1]
            columns.append(np.repeat(edges, examples.store.lengths[sequences]))
        return np.stack(columns, axis=1)

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError("words stand in sequences: batch_loss")

    def batch_loss(self, logits: Any, targets: Tensor, weights: Tensor, lengths: Sequence[int]) -> Tensor:
        """Each word's negative log-likelihood, or each sequence's for a CRF, summed.

        A CRF's chain that a window cuts off its text may begin and end with any tag: within a span too.
        """
        import torch
        from torch.nn.functional import cross_entropy

        tags, words, *edges = targets.unbind(1)
        first = tags != NO_TARGET
        owner = torch.repeat_interleave(
            torch.arange(len(lengths), device=tags.device), torch.as_tensor(lengths, device=tags.device)
        )
        emissions = logits[first] if self.alignment == "first" else _means(logits, words, first)
        counts = torch.zeros_like(weights).index_add_(0, owner[first], torch.ones_like(weights)[owner[first]])
        if self.crf is None:
            each = cross_entropy(emissions.float(), tags[first], reduction="none", label_smoothing=self.label_smoothing)
            return (each * (weights / counts.clamp(min=1))[owner[first]]).sum()
        bounds = torch.nn.functional.pad(counts.long().cumsum(0), (1, 0))
        edge = edges[0][torch.as_tensor(lengths, device=tags.device).cumsum(0) - 1]
        each = self.crf.log_likelihood(emissions, tags[first], bounds, (edge & BEGINS) > 0, (edge & ENDS) > 0)
        return -(each * (weights > 0)).sum()

    # -- answers -------------------------------------------------------------------------------------------------------

    def metrics(self) -> Metrics:
        return SpanMetrics()

    def _emissions(self, examples: Examples, sequences: np.ndarray, outputs: Outputs) -> dict[int, tuple]:
        """By row: the numbers of its words that have tokens, and their logits [n, C]."""
        assert examples.words is not None and examples.row_of is not None
        parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        for sequence, logits in zip(sequences, outputs, strict=True):
            word = examples.words[examples.store.offsets[sequence] : examples.store.offsets[sequence + 1]]
            mine = np.flatnonzero(word >= 0)
            begins = mine[np.diff(word[mine], prepend=-1) != 0]
            values = logits[begins]
            if self.alignment == "mean" and len(begins):
                cuts = np.searchsorted(mine, begins)
                sizes = np.diff(cuts, append=len(mine))
                values = np.add.reduceat(logits[mine], cuts, axis=0) / sizes[:, None]
            parts.setdefault(int(examples.row_of[sequence]), []).append((word[begins], values))
        found = {}
        for row, pieces in parts.items():
            numbers = np.concatenate([n for n, _ in pieces])
            order = np.argsort(numbers, kind="stable")
            found[row] = (numbers[order], np.concatenate([v for _, v in pieces])[order])
        return found

    def _tagged(self, emissions: dict[int, tuple]) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """By row: words, their tags' numbers, and probabilities [n, C]."""
        logits = [values for _, values in emissions.values()]
        if self.crf is None:
            chances = [softmax(v) if len(v) else v for v in logits]
            tags = [p.argmax(axis=-1) if len(p) else np.zeros(0, dtype=np.int64) for p in chances]
        else:
            chances, tags = self.crf.marginals(logits), self.crf.best(logits)
        return {
            row: (words, tag, p) for (row, (words, _)), tag, p in zip(emissions.items(), tags, chances, strict=True)
        }

    def score(self, metrics: Metrics, examples: Examples, sequences: np.ndarray, outputs: Outputs) -> None:
        assert isinstance(metrics, SpanMetrics) and examples.rows.labels is not None
        for row, (numbers, tags, _) in self._tagged(self._emissions(examples, sequences, outputs)).items():
            words = self.words(examples.rows, row)
            gold, _ = self._numbers(examples.rows.labels[row], words, numbers)
            found = self._names(numbers, tags, len(words))
            chosen = np.array([self.labels.index(t) if t else NO_TARGET for t in found], dtype=np.int64)
            known = gold != NO_TARGET
            metrics.add(
                examples.rows.labels[row],
                self._char_spans(chunks(found) if self.tags != "none" else _each(found), words),
                self._char_spans(strict_chunks(found, self.tags) if self.tags != "none" else _each(found), words),
                int(known.sum()),
                int((gold == chosen)[known].sum()),
            )

    def _names(self, numbers: np.ndarray, tags: np.ndarray, words: int) -> list[str]:
        # A word that the tokenizer makes nothing of (a zero-width space) has no tag of its own.
        names = ["" if self.tags == "none" else "O"] * words
        for number, tag in zip(numbers, tags, strict=True):
            names[number] = self.labels[tag]
        return names

    @staticmethod
    def _char_spans(found: Sequence[tuple[int, int, str]], words: Words) -> list[tuple[int, int, str]]:
        return [(words[first][0], words[last - 1][1], kind) for first, last, kind in found]

    def decode(self, logits: np.ndarray) -> list[Prediction]:
        raise NotImplementedError("a text's answer needs its words: answers")

    def answers(self, examples: Examples, outputs: Outputs) -> list[Prediction]:
        tagged = self._tagged(self._emissions(examples, np.arange(len(examples.store)), outputs))
        return [self._answer(examples.rows, row, *tagged[row]) for row in range(len(examples.rows))]

    def _answer(self, rows: Rows, row: int, numbers: np.ndarray, tags: np.ndarray, chances: np.ndarray) -> Prediction:
        text, words = rows.texts[row], self.words(rows, row)
        names = self._names(numbers, tags, len(words))
        sure = np.zeros(len(words))
        sure[numbers] = chances[np.arange(len(tags)), tags] if len(tags) else 0.0
        spans = []
        for first, last, kind in chunks(names) if self.tags != "none" else _each(names):
            start, end = words[first][0], words[last - 1][1]
            spans.append(Span(start, end, kind, text[start:end], float(sure[first:last].mean())))
        return Prediction(tuple(f"{s.text}/{s.label}" for s in spans), {}, tuple(spans))

    def answer(self, prediction: Prediction, top_k: int | None) -> dict[str, Any]:
        return {
            "spans": [
                {"start": s.start, "end": s.end, "label": s.label, "text": s.text, "score": s.score}
                for s in prediction.spans
            ]
        }

    def shown(self, prediction: Prediction) -> str:
        return "  ".join(f"{s.text}/{s.label}" for s in prediction.spans) or "(none)"

    def cell(self, prediction: Prediction, separator: str) -> str:
        return self.shown(prediction) if prediction.spans else ""

    def example_answer(self) -> dict[str, Any]:
        return {"spans": [{"start": 0, "end": 5, "label": self.kinds[0], "text": "Paris", "score": 0.98}]}

    def worst_rows(
        self, examples: Examples, sequences: np.ndarray, outputs: Outputs, keep: int
    ) -> list[tuple[float, int, tuple[str, str]]]:
        found = []
        for row, (numbers, tags, chances) in self._tagged(self._emissions(examples, sequences, outputs)).items():
            words, gold = self.words(examples.rows, row), examples.rows.labels[row]  # type: ignore[index]
            wanted = self._numbers(gold, words, numbers)[0][numbers]
            known = wanted != NO_TARGET
            right = chances[np.arange(len(numbers))[known], wanted[known]]
            loss = float(-np.log(np.maximum(right, 1e-30)).sum())
            found.append((loss, row, numbers, tags, chances))
        text = examples.rows.texts
        told = []
        for loss, row, numbers, tags, chances in sorted(found, key=lambda f: -f[0])[:keep]:
            gold = examples.rows.labels[row]  # type: ignore[index]
            expected = "  ".join(f"{text[row][start:end]}/{kind}" for start, end, kind in gold) or "(none)"
            told.append((loss, row, (expected, self.shown(self._answer(examples.rows, row, numbers, tags, chances)))))
        return told


def _each(names: Sequence[str]) -> list[tuple[int, int, str]]:
    return [(i, i + 1, name) for i, name in enumerate(names) if name]


def covered_words(spans: CharSpans, words: Words) -> tuple[list[Chunk], int]:
    """The words that each span covers, in part at least, none of them twice; and how many of the spans do not begin
    and end where words do."""
    starts, ends = (np.array(bounds, dtype=np.int64) for bounds in (zip(*words, strict=True) if words else ((), ())))
    found: list[Chunk] = []
    odd = taken = 0
    for start, end, kind in spans:
        first = max(taken, int(np.searchsorted(ends, start, side="right")))
        last = int(np.searchsorted(starts, end))
        if first < last:
            found.append((first, last, kind))
            taken = last
        odd += not (first < last and starts[first] == start and ends[last - 1] == end)
    return found, odd


def _tags_every_word(rows: Rows) -> bool:
    if rows.pairs is None or rows.labels is None:
        return False
    return all(
        words is not None and len(words) == len(spans) for words, spans in zip(rows.pairs, rows.labels, strict=True)
    )


def _word_of_token(chars: np.ndarray, words: Words) -> np.ndarray:
    """The word that each token begins in, -1 for none. Shape: chars [n, 2] -> [n] int64."""
    if not words or not len(chars):
        return np.full(len(chars), -1, dtype=np.int64)
    bounds = np.asarray(words, dtype=np.int64)
    found = np.searchsorted(bounds[:, 0], chars[:, 0], side="right") - 1
    inside = (found >= 0) & (chars[:, 0] < bounds[found, 1]) & (chars[:, 1] > chars[:, 0])
    return np.where(inside, found, -1)


def _means(logits: Tensor, words: Tensor, first: Tensor) -> Tensor:
    """Mean of the logits of each word's tokens, which for a linear head is the head of their mean. [T, C] -> [N, C]."""
    import torch

    inside = words >= 0
    group = first.long().cumsum(0)[inside] - 1
    sums = logits.new_zeros(int(first.sum()), logits.shape[-1]).index_add(0, group, logits[inside])
    sizes = torch.zeros(len(sums), device=logits.device, dtype=logits.dtype).index_add_(
        0, group, torch.ones_like(group, dtype=logits.dtype)
    )
    return sums / sizes[:, None]


__all__ = ["COLUMNS", "Tagging"]
