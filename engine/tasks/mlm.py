"""Masked language modelling, from scratch or continued, with or without a task over pairs of sentences.

What is hidden is drawn anew each time a sequence is seen. The head over the vocabulary computes the hidden tokens'
rows and no others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.engine.data.rows import Rows
from regraft.engine.data.tokens import TokenStore
from regraft.engine.errors import ConfigError, DataError
from regraft.engine.examples import Examples
from regraft.engine.tasks.base import MARKED, Metrics, Outputs, Prediction, Span, Task
from regraft.engine.tasks.classification import softmax
from regraft.engine.tasks.documents import full_length, read_documents, sentence_starts
from regraft.engine.tasks.language_metrics import LanguageMetrics
from regraft.engine.tasks.masking import choose, hide
from regraft.engine.tasks.sentence_pairs import PairExamples, PairSource, sentences_of
from regraft.engine.tasks.windows import Pieces, StoreBuilder, pieces_of, template
from regraft.engine.tasks.words import words_of

if TYPE_CHECKING:
    from torch import Tensor

    from regraft.engine.config import DataConfig, TaskConfig
    from regraft.engine.data.fast_tokenizer import FastTokenizer

MASKS = ("[MASK]", "<mask>")
SHOWN = 5


class MaskedLanguage(Task):
    type = "mlm"
    reads = MARKED
    labels = ()
    metrics_known = ("perplexity", "loss", "accuracy", "sentence_accuracy")
    smaller_is_better = ("perplexity", "loss")

    def __init__(
        self, *, share: float = 0.15, masking: str = "word", sentences: str = "none", metric: str | None = None
    ) -> None:
        self.share, self.masking, self.sentences = share, masking, sentences
        self.auto_model = "AutoModelForMaskedLM" if sentences == "none" else "AutoModelForPreTraining"
        self.metric = metric or "perplexity"
        if self.metric not in self.metrics_known:
            raise ConfigError(f"task.metric: {metric!r} is not a figure of mlm: {', '.join(self.metrics_known)}")
        self._backend: Any = None
        self._pair_weight = 1.0  # masked tokens a pair has on average: both losses are means

    @classmethod
    def read(
        cls, path: str, data: DataConfig, *, split: str, need_labels: bool = True, limit: int | None = None
    ) -> Rows:
        return read_documents(path, data, split=split, limit=limit)

    @classmethod
    def take(cls, item: Mapping[str, Any]) -> tuple[str, Any]:
        if item.get("text_pair") is not None:
            raise ValueError("text_pair: this task takes one text")
        return super().take(item)

    @classmethod
    def from_rows(cls, config: TaskConfig, train: Rows, label_column: str | int) -> MaskedLanguage:
        return cls(share=config.mask_share, masking=config.masking, sentences=config.sentences, metric=config.metric)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> MaskedLanguage:
        return cls(**{key: spec[key] for key in ("share", "masking", "sentences", "metric")})

    def spec(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "labels": [],
            "share": self.share,
            "masking": self.masking,
            "sentences": self.sentences,
            "metric": self.metric,
        }

    @property
    def outputs(self) -> int:
        return 0  # as many as the vocabulary has

    def encode(
        self, rows: Rows, label_column: str | int = "label", unknown: str = "error"
    ) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(len(rows), dtype=np.int64), np.arange(len(rows))

    def attach(self, model: Any) -> None:
        heads = ("seq_relationship", "sop_classifier")
        if self.sentences != "none" and not any(n.rpartition(".")[2] in heads for n, _ in model.named_modules()):
            raise ConfigError(
                f"task.sentences: {self.sentences}: {type(model).__name__} has no head for pairs of sentences; BERT and "
                "ALBERT have. Set task.sentences: none"
            )

    # -- documents to sequences ----------------------------------------------------------------------------------------

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
        self._backend = tokenizer.backend
        if mask_token(tokenizer.backend) is None:
            raise ConfigError(f"task.type: mlm: the tokenizer has no mask token; looked for {' and '.join(MASKS)}")
        if not labelled:
            return self._to_fill(rows, tokenizer, max_length)
        tokens = pieces_of(tokenizer, rows.texts, rows.where)
        words = [_words(text, pieces) for text, pieces in zip(rows.texts, tokens, strict=True)]
        make = self._full if self.sentences == "none" else self._pairs
        made = make(rows, tokenizer, max_length, tokens, words)
        if not len(made):
            lacks = "any text" if self.sentences == "none" else "two sentences, so there are no pairs (task.sentences)"
            raise DataError(f"{rows.path}: no document has {lacks}")
        if rows.split == "train":
            self._pair_weight = max(1.0, self.share * float((made.words >= 0).sum()) / len(made.store))  # type: ignore[operator, union-attr]
        return made

    def _full(
        self, rows: Rows, tokenizer: FastTokenizer, room: int, tokens: list[Pieces], words: list[np.ndarray]
    ) -> Examples:
        shape = template(tokenizer)
        parts, sizes = full_length([len(p.ids) for p in tokens], room, shape.tokens)
        builder, spoken = StoreBuilder(tokenizer), []
        for part in parts:
            ids, types, places = shape.sequence(tokens[part.row].ids[part.start : part.end])
            builder.add(ids, types)
            spoken.append(_placed(places, words[part.row][part.start : part.end]))
        groups = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        row_of = np.array([part.row for part in parts], dtype=np.int64)
        flat = np.concatenate(spoken).astype(np.int32) if spoken else np.zeros(0, dtype=np.int32)
        none = np.zeros(len(parts), dtype=np.int64)  # no pairs, no labels
        weights = np.ones(len(parts), dtype=np.float32)
        return Examples(rows, builder.store(), none, weights, row_of=row_of, groups=groups, words=flat)

    def _pairs(
        self, rows: Rows, tokenizer: FastTokenizer, max_length: int, tokens: list[Pieces], words: list[np.ndarray]
    ) -> Examples:
        shape = template(tokenizer, 2)
        room = max_length - shape.tokens
        if room < 2:
            raise ConfigError(f"model.max_length: {max_length} leaves no room for pairs (task.sentences)")
        begins = [
            np.searchsorted(pieces.chars[:, 0], sentence_starts(text))
            for text, pieces in zip(rows.texts, tokens, strict=True)
        ]
        sentences = sentences_of([pieces.ids for pieces in tokens], words, begins)
        stretches = sentences.stretches(room)
        row_of = np.searchsorted(sentences.ends, stretches[:, 0], side="right")
        source = PairSource(sentences, stretches, row_of, shape, tokenizer, room, self.sentences)
        units = np.arange(len(stretches))
        builder, spoken, labels = source.make(units, np.random.Generator(np.random.Philox(len(rows))))
        weights, counts = np.ones(len(units), dtype=np.float32), {"pairs": len(units)}
        return PairExamples(
            rows, builder.store(), labels, weights, row_of=row_of, words=spoken, counts=counts, source=source
        )

    def _to_fill(self, rows: Rows, tokenizer: FastTokenizer, max_length: int) -> Examples:
        token, number = mask_token(tokenizer.backend) or ("", -1)
        shape, builder = template(tokenizer), StoreBuilder(tokenizer)
        marks, chars = [], []
        for row, pieces in enumerate(pieces_of(tokenizer, rows.texts, rows.where)):
            if not (pieces.ids == number).any():
                raise DataError(f"{rows.where(row)}: there is nothing to fill in: the text has no {token}")
            ids, types, places = shape.sequence(pieces.ids)
            if len(ids) > max_length:
                raise DataError(f"{rows.where(row)}: {len(ids)} tokens; the model takes {max_length}")
            builder.add(ids, types)
            marks.append(ids == number)
            stands = np.full((len(ids), 2), -1, dtype=np.int32)
            stands[places >= 0] = pieces.chars
            chars.append(stands)
        flat = np.concatenate(marks) if marks else np.zeros(0, dtype=bool)
        stood = np.concatenate(chars) if chars else None
        return Examples(rows, builder.store(), None, np.ones(len(rows), np.float32), chars=stood, marks=flat)

    # -- masks ---------------------------------------------------------------------------------------------------------

    def draw(self, examples: Examples, units: np.ndarray, seed: Sequence[int]) -> tuple[Examples, np.ndarray]:
        """The units with tokens hidden, as examples of their own."""
        if examples.marks is not None:
            return examples, units
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([*seed, len(units)])))
        if isinstance(examples, PairExamples):
            examples, units = examples.drawn(units, rng), np.arange(len(units))
        assert examples.words is not None and examples.targets is not None
        sequences = examples.sequences(units)
        where = examples.tokens(sequences)
        lengths = examples.store.lengths[sequences]
        owner = np.repeat(np.arange(len(sequences)), lengths)
        chosen = choose(examples.words[where], owner, self.share, self.masking, rng)
        _, mask_id = mask_token(self._backend)  # type: ignore[misc]
        ids = examples.store.ids[where]
        shown = hide(ids, chosen, mask_id, self._backend.get_vocab_size(), rng)
        types = None if examples.store.types is None else examples.store.types[where]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        groups = examples.groups
        if groups is not None:
            groups = np.concatenate([[0], np.cumsum(groups[units + 1] - groups[units])])
        drawn = replace(
            examples,
            store=TokenStore(shown, offsets, types),
            targets=np.where(chosen, ids, -examples.targets[sequences][owner] - 1),
            weights=np.bincount(owner[chosen], minlength=len(sequences)).astype(np.float32),
            row_of=None if examples.row_of is None else examples.row_of[sequences],
            groups=groups,
            words=examples.words[where],
            marks=chosen,
        )
        return drawn, np.arange(len(units))

    # -- loss ----------------------------------------------------------------------------------------------------------

    def targets_of(self, examples: Examples, sequences: np.ndarray) -> np.ndarray:
        """[M + B]: the tokens that are hidden, then of each sequence whether its second part does not follow."""
        assert examples.targets is not None and examples.marks is not None
        where = examples.tokens(sequences)
        hidden = examples.targets[where][examples.marks[where]].astype(np.int64)
        labels = (
            -examples.targets[examples.store.offsets[sequences]].astype(np.int64) - 1
        )  # the first token is never hidden
        return np.concatenate([hidden, labels])

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError("hidden tokens and pairs stand in one batch: batch_loss")

    def batch_loss(self, logits: Any, targets: Tensor, weights: Tensor, lengths: Sequence[int]) -> Tensor:
        from torch.nn.functional import cross_entropy

        from regraft.engine.vocabulary_head import HeldBack

        words, pair = logits if isinstance(logits, tuple) else (logits, None)
        live = (weights > 0).any().float()  # a process without a share takes part with nothing
        hidden = targets[: len(words)]
        if isinstance(words, HeldBack):
            total = words.cross_entropy(hidden) * live
        else:
            total = cross_entropy(words.float(), hidden, reduction="sum") * live
        if pair is not None:
            total = (
                total + cross_entropy(pair.float(), targets[len(words) :], reduction="sum") * live * self._pair_weight
            )
        return total

    # -- figures and answers -------------------------------------------------------------------------------------------

    def metrics(self) -> Metrics:
        return LanguageMetrics()

    def score(self, metrics: Metrics, examples: Examples, sequences: np.ndarray, outputs: Outputs) -> None:
        assert isinstance(metrics, LanguageMetrics)
        for sequence, output in zip(sequences, outputs, strict=True):
            logits, pair = output if isinstance(output, tuple) else (output, None)
            found = self.targets_of(examples, np.array([sequence]))
            metrics.update(logits, found[: len(logits)])
            if pair is not None:
                metrics.pairs(int(pair.argmax()), int(found[-1]))

    def decode(self, logits: np.ndarray) -> list[Prediction]:
        raise NotImplementedError("a filled text needs its tokens: answers")

    def answers(self, examples: Examples, outputs: Outputs) -> list[Prediction]:
        assert examples.marks is not None and examples.chars is not None
        found = []
        for row, output in enumerate(outputs):
            logits = output[0] if isinstance(output, tuple) else output
            span = slice(examples.store.offsets[row], examples.store.offsets[row + 1])
            places = examples.chars[span][examples.marks[span]]
            found.append(self._filled(examples.rows.texts[row], places, logits))
        return found

    def _filled(self, text: str, places: np.ndarray, logits: np.ndarray) -> Prediction:
        chances = softmax(logits)
        masks, spans, filled, at = [], [], "", 0
        for (start, end), p in zip(places.tolist(), chances, strict=True):
            best = np.argpartition(-p, min(20, len(p) - 1))[:20]
            best = best[np.argsort(-p[best], kind="stable")]
            named = [
                (self._backend.decode([int(i)]).strip() or str(self._backend.id_to_token(int(i))), float(p[i]))
                for i in best
            ]
            masks.append([{"token": token, "score": score} for token, score in named])
            token, score = named[0]
            filled += text[at:start] + token
            spans.append(Span(start, end, token, text[start:end], score))
            at = end
        return Prediction(filled + text[at:], {}, tuple(spans), {"masks": masks})

    def answer(self, prediction: Prediction, top_k: int | None) -> dict[str, Any]:
        masks = [
            {"start": span.start, "end": span.end, "candidates": candidates[: top_k or SHOWN]}
            for span, candidates in zip(prediction.spans, prediction.extra["masks"], strict=True)
        ]
        return {"filled": prediction.label, "masks": masks}

    def example_answer(self) -> dict[str, Any]:
        mask = {"start": 11, "end": 17, "candidates": [{"token": "good", "score": 0.41}]}
        return {"filled": "The film is good.", "masks": [mask]}

    def worst_rows(
        self, examples: Examples, sequences: np.ndarray, outputs: Outputs, keep: int
    ) -> list[tuple[float, int, tuple[str, str]]]:
        return []  # the hardest documents say nothing that a reader can mend


def mask_token(backend: Any) -> tuple[str, int] | None:
    """The tokenizer's mask and its number."""
    return next(((t, n) for t in MASKS if (n := backend.token_to_id(t)) is not None), None)


def _words(text: str, pieces: Pieces) -> np.ndarray:
    """The word each token begins in; one of its own where it begins in none. Shape: [n] int64."""
    bounds = np.array([start for start, _ in words_of(text)] or [0], dtype=np.int64)
    return np.searchsorted(bounds, pieces.chars[:, 0], side="right")


def _placed(places: np.ndarray, words: np.ndarray) -> np.ndarray:
    found = np.full(len(places), -1, dtype=np.int64)
    found[places >= 0] = words
    return found


__all__ = ["MaskedLanguage", "mask_token"]
