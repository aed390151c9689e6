"""Rows of several tasks side by side: one numbering over all, each task's own examples within reach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from regraft.engine.data.rows import Rows
from regraft.engine.data.tokens import TokenStore
from regraft.engine.examples import Examples


@dataclass(frozen=True)
class MixedRows(Rows):
    """The rows of every task, one after the other; each knows its own file."""

    parts: tuple[Rows, ...] = ()

    def where(self, index: int, column: str | int | None = None) -> str:
        starts = _starts([len(rows) for rows in self.parts])
        part = int(np.searchsorted(starts, index, side="right")) - 1
        return self.parts[part].where(index - int(starts[part]), column)


@dataclass(frozen=True)
class MixedExamples(Examples):
    """Sequences, rows and units of all tasks, numbered one task after the other.

    `parts`: each task's own examples, whose tokens are a slice of the whole store's; targets are found there.
    """

    parts: Mapping[str, Examples] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Mapping[str, Examples]) -> MixedExamples:
        each = list(parts.values())
        store = _joined_store([part.store for part in each])
        sizes = [len(part.store) for part in each]
        row_of, groups = None, None
        if any(part.row_of is not None for part in each):
            owners = [np.arange(len(p.store)) if p.row_of is None else p.row_of for p in each]
            first = _starts([len(part.rows) for part in each])
            row_of = np.concatenate([rows + start for rows, start in zip(owners, first, strict=True)])
        if any(part.groups is not None for part in each):
            bounds = [np.arange(len(p.store) + 1) if p.groups is None else p.groups for p in each]
            joined = [b[1:] + start for b, start in zip(bounds, _starts(sizes), strict=True)]
            groups = np.concatenate([np.zeros(1, dtype=np.int64), *joined])
        weights = np.concatenate([part.weights for part in each])
        mixed = cls(_joined_rows(parts), store, None, weights, row_of=row_of, groups=groups, parts=parts)
        return replace(mixed, parts=mixed.sliced())

    def sliced(self) -> dict[str, Examples]:
        """The parts with their tokens as slices of the whole store, so that nothing is held twice."""
        found, token = {}, 0
        for name, part in self.parts.items():
            span = slice(token, token + len(part.store.ids))
            types = None if part.store.types is None or self.store.types is None else self.store.types[span]
            found[name] = replace(part, store=replace(part.store, ids=self.store.ids[span], types=types))
            token = span.stop
        return found

    def renumbered(self, ids: np.ndarray) -> MixedExamples:
        whole = replace(self, store=replace(self.store, ids=ids))
        return replace(whole, parts=whole.sliced())

    def turn(self, units: np.ndarray) -> tuple[str, np.ndarray]:
        """The task that all of `units` are of, and their numbers among that task's own."""
        starts = _starts([len(part) for part in self.parts.values()])
        number = int(np.searchsorted(starts, units[0], side="right")) - 1
        name, part = list(self.parts.items())[number]
        own = units - starts[number]
        if own.min() < 0 or own.max() >= len(part):
            raise ValueError("a step holds rows of one task")
        return name, own

    def by_task(self, sequences: np.ndarray) -> Iterator[tuple[str, Examples, np.ndarray, np.ndarray]]:
        """Of sequences of several tasks: task, its examples, the sequences' numbers there, their places in `sequences`."""
        starts = _starts([len(part.store) for part in self.parts.values()])
        owner = np.searchsorted(starts, sequences, side="right") - 1
        for number, (name, part) in enumerate(self.parts.items()):
            places = np.flatnonzero(owner == number)
            if len(places):
                yield name, part, sequences[places] - starts[number], places

    @property
    def first_row(self) -> dict[str, int]:
        """By task: the number of its first row."""
        return dict(zip(self.parts, _starts([len(p.rows) for p in self.parts.values()]).tolist(), strict=True))


def _starts(sizes: list[int]) -> np.ndarray:
    """Where each part begins, [n] int64."""
    return np.cumsum([0, *sizes])[:-1].astype(np.int64)


def _joined_store(stores: list[TokenStore]) -> TokenStore:
    ends = [s.offsets[1:] + start for s, start in zip(stores, _starts([len(s.ids) for s in stores]), strict=True)]
    types = None
    if any(s.types is not None for s in stores):
        types = np.concatenate([np.zeros(len(s.ids), np.uint8) if s.types is None else s.types for s in stores])
    return TokenStore(
        np.concatenate([s.ids for s in stores]),
        np.concatenate([np.zeros(1, dtype=np.int64), *ends]),
        types,
        sum(s.truncated for s in stores),
        sum(s.cut_tokens for s in stores),
    )


def _joined_rows(parts: Mapping[str, Examples]) -> MixedRows:
    each = [part.rows for part in parts.values()]
    labels = [label for rows in each for label in (rows.labels if rows.labels is not None else [None] * len(rows))]
    pairs = [pair for rows in each for pair in (rows.pairs if rows.pairs is not None else [None] * len(rows))]
    return MixedRows(
        each[0].split,
        ", ".join(dict.fromkeys(rows.path for rows in each)),
        [text for rows in each for text in rows.texts],
        labels,
        np.concatenate([rows.lines for rows in each]),
        pairs,
        {f"{name}: {rule}": n for name, part in parts.items() for rule, n in part.rows.dropped.items()},
        parts=tuple(each),
    )
