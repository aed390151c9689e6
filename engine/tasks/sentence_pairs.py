"""Pairs of parts of documents, drawn anew each time a pair is learned from (next sentence as in BERT, or sentence order).

What stays the same over a run is where the pairs are taken: stretches of whole sentences. Where a stretch is cut in
two, and whether its second part is exchanged for one of another document (or the two change places), is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from regraft.engine.examples import Examples
from regraft.engine.tasks.windows import StoreBuilder, Template

if TYPE_CHECKING:
    from regraft.engine.data.fast_tokenizer import FastTokenizer

Piece = tuple[int, int]  # tokens of the documents' flat arrays, first and last + 1


@dataclass(frozen=True)
class Sentences:
    """D documents as tokens, sentence by sentence.

    Shape: ids, words [T]; starts [S + 1], the token each sentence begins at, and T at last; ends [D], the number of the
    sentence after each document's last. Documents without tokens have no sentences.
    """

    ids: np.ndarray
    words: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def stretches(self, room: int) -> np.ndarray:
        """First sentence and last + 1 of stretches that have at least two sentences and, beyond these, at most `room`
        tokens, [U, 2]. Every sentence of a document with two or more is in at least one of them."""
        found: list[tuple[int, int]] = []
        first = 0
        for end in self.ends.tolist():
            at = first
            while end - first > 1 and at < end:
                at = min(at, end - 2)  # a last sentence that is left alone is paired with the one before it
                last = max(at + 2, min(self._fitting(at, room), end))
                found.append((at, last))
                at = last
            first = end
        return np.array(found, dtype=np.int64).reshape(-1, 2)

    def document_of(self, sentence: int) -> int:
        return int(np.searchsorted(self.ends, sentence, side="right"))

    def _fitting(self, at: int, room: int) -> int:
        """The sentence after the last that still fits into `room` tokens from the beginning of sentence `at`."""
        return int(np.searchsorted(self.starts, self.starts[at] + room, side="right")) - 1

    def draw(self, stretch: Piece, room: int, how: str, rng: np.random.Generator) -> tuple[Piece, Piece, int]:
        """Both parts, of at most `room` tokens in all, and the label: 0 where the second follows the first, else 1.
        `how`: 'nsp' or 'order'."""
        first, last = stretch
        middle = int(rng.integers(first + 1, last))
        a, b = self._tokens(first, middle), self._tokens(middle, last)
        wrong = bool(rng.integers(2)) and (how == "order" or self._others(first) > 0)
        if wrong and how == "order":
            a, b = b, a
        elif wrong:
            b = self._elsewhere(first, room - (a[1] - a[0]), rng)
        return *shortened(a, b, room), int(wrong)

    def _tokens(self, first: int, last: int) -> Piece:
        return int(self.starts[first]), int(self.starts[last])

    def _bounds(self, sentence: int) -> Piece:
        """Sentences of the document that a sentence is of."""
        document = self.document_of(sentence)
        return int(self.ends[document - 1]) if document else 0, int(self.ends[document])

    def _others(self, sentence: int) -> int:
        low, high = self._bounds(sentence)
        return len(self.starts) - 1 - (high - low)

    def _elsewhere(self, sentence: int, room: int, rng: np.random.Generator) -> Piece:
        """Sentences of another document, drawn by sentence: a long document is met more often."""
        low, high = self._bounds(sentence)
        at = int(rng.integers(self._others(sentence)))
        at = at if at < low else at + high - low
        last = max(at + 1, min(self._fitting(at, room), self._bounds(at)[1]))
        return self._tokens(at, last)


def shortened(a: Piece, b: Piece, room: int) -> tuple[Piece, Piece]:
    """Both cut at their ends to `room` tokens in all, the longer first."""
    sizes = [a[1] - a[0], b[1] - b[0]]
    over = sum(sizes) - room
    if over > 0:
        long = int(sizes[1] >= sizes[0])
        apart = min(over, sizes[long] - sizes[1 - long])
        sizes[long] -= apart
        sizes[long] -= (over - apart + 1) // 2
        sizes[1 - long] -= (over - apart) // 2
    return (a[0], a[0] + sizes[0]), (b[0], b[0] + sizes[1])


@dataclass(frozen=True)
class PairSource:
    """What pairs are made of: `stretches` [U, 2] of `sentences`, one for each unit, and `row_of` [U] their documents."""

    sentences: Sentences
    stretches: np.ndarray
    row_of: np.ndarray
    template: Template
    tokenizer: FastTokenizer
    room: int
    how: str

    def make(self, units: np.ndarray, rng: np.random.Generator) -> tuple[StoreBuilder, np.ndarray, np.ndarray]:
        """Sequences of the units' pairs, their tokens' words [T'] (-1 for the model's own) and labels [U']."""
        flat = self.sentences
        builder, words, labels = StoreBuilder(self.tokenizer), [], []
        for first, last in self.stretches[units].tolist():
            (a, z), (b, y), label = flat.draw((first, last), self.room, self.how, rng)
            ids, types, places = self.template.sequence(flat.ids[a:z], flat.ids[b:y])
            one, two = flat.words[a:z], flat.words[b:y]
            spoken = np.full(len(ids), -1, dtype=np.int64)
            # Words of the second part get numbers of their own, or a word cut off would go on in it.
            spoken[places >= 0] = np.concatenate([one, two + 1 + one.max(initial=0)])
            builder.add(ids, types)
            words.append(spoken)
            labels.append(label)
        joined = np.concatenate(words) if words else np.zeros(0, dtype=np.int64)
        return builder, joined.astype(np.int32), np.array(labels, dtype=np.int64)


@dataclass(frozen=True)
class PairExamples(Examples):
    """Pairs as they were drawn once, and what they are drawn from again. Lengths of a unit differ a little from draw to
    draw; `lengths` are those of the first."""

    source: PairSource | None = None

    def drawn(self, units: np.ndarray, rng: np.random.Generator) -> PairExamples:
        """The units with pairs drawn anew, as examples of their own."""
        assert self.source is not None
        builder, words, labels = self.source.make(units, rng)
        weights = np.ones(len(units), dtype=np.float32)
        rows = self.source.row_of[units]
        return replace(self, store=builder.store(), targets=labels, weights=weights, row_of=rows, words=words)


def sentences_of(ids: Sequence[np.ndarray], words: Sequence[np.ndarray], begins: Sequence[np.ndarray]) -> Sentences:
    """Documents with the tokens that their sentences begin at, as flat arrays. Documents without tokens are left out of
    the sentences, not of the count: `ends` has an entry for each."""
    starts: list[np.ndarray] = []
    ends, at, count = [], 0, 0
    for tokens, begin in zip(ids, begins, strict=True):
        own = np.unique(begin[begin < len(tokens)])
        starts.append(own + at)
        count += len(own)
        at += len(tokens)
        ends.append(count)
    flat = [np.concatenate(parts) if len(parts) else np.zeros(0, dtype=np.int64) for parts in (ids, words)]
    return Sentences(flat[0], flat[1], np.concatenate([*starts, [at]]).astype(np.int64), np.array(ends, dtype=np.int64))
