"""What is asked of several tasks at once: each reads what it can, and no sequence goes through the encoder twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.engine.data.read import stream_items, text_lines
from regraft.engine.data.rows import Rows
from regraft.engine.data.tokens import TokenStore
from regraft.engine.errors import DataError, nearest
from regraft.engine.examples import Examples

if TYPE_CHECKING:
    from regraft.engine.config import DataConfig
    from regraft.engine.data.fast_tokenizer import FastTokenizer
    from regraft.engine.tasks.several import Several


@dataclass(frozen=True)
class Asked:
    """What stands beside a text that several tasks answer: for each that does, the text and what stands beside it
    as that task takes them."""

    inputs: Mapping[str, tuple[str, Any]]

    @property
    def strings(self) -> list[str]:
        """All texts in it."""
        beside = [other if isinstance(other, tuple) else (other,) for _, other in self.inputs.values()]
        found = [*(text for text, _ in self.inputs.values()), *(part for parts in beside for part in parts)]
        return [part for part in found if isinstance(part, str)]


@dataclass(frozen=True)
class Part:
    """What one task makes of the rows that it answers. `rows`: their numbers; `places` [S]: which sequence of the whole
    each of its own sequences is."""

    task: str
    rows: list[int]
    examples: Examples
    places: list[int]


@dataclass(frozen=True)
class AskedExamples(Examples):
    """Each row's sequences, every one once, whichever tasks read it."""

    asked: tuple[Part, ...] = ()


def take(several: Several, item: Mapping[str, Any]) -> tuple[str, Asked]:
    """Raises ValueError, the field first, where a task that is named cannot read the item, or none can."""
    names = item.get("tasks")
    given = {key: value for key, value in item.items() if key != "tasks"}
    for name in names or ():
        if name not in several.tasks:
            raise ValueError(f"tasks: {name!r} is not known{nearest(name, several.tasks)}: {', '.join(several.tasks)}")
    found: dict[str, tuple[str, Any]] = {}
    refused: ValueError | None = None
    for name in names or several.tasks:
        try:
            found[name] = _taken(several, name, given)
        except ValueError as error:
            if names:
                raise
            refused = refused or error
    if not found:
        raise refused or ValueError("tasks: expected at least one name")
    return next(iter(found.values()))[0], Asked(found)


def _taken(several: Several, name: str, item: Mapping[str, Any]) -> tuple[str, Any]:
    task = several.tasks[name]
    text, beside = task.take(item)
    if name in several.pairs and several.pairs[name] != (beside is not None):
        wanted = "reads pairs; field required" if several.pairs[name] else "reads one text"
        raise ValueError(f"text_pair: {name} {wanted}")
    return text, beside


def lines(several: Several, source: Any, data: DataConfig, dropped: dict[str, int]) -> Iterator[tuple[str, Any]]:
    """What every line of a stream asks: a text, or an object as in a request. Raises DataError with the line."""
    try:
        several.take({"text": ""})
        one_text = True
    except ValueError:  # none of the tasks reads a text alone
        one_text = False

    def kept() -> Iterator[tuple[int, str]]:
        for number, line in text_lines(source, data.encoding, one_text=one_text):
            if data.empty == "drop" and not line.strip():
                dropped["empty"] = dropped.get("empty", 0) + 1
            else:
                yield number, line

    return stream_items(kept(), several.take)


def examples_of(several: Several, rows: Rows, tokenizer: FastTokenizer, max_length: int) -> AskedExamples:
    """The sequences of rows whose `pairs` are `Asked`, or plain second texts. Raises DataError."""
    asked = [_asked(several, rows, row) for row in range(len(rows))]
    found: list[dict[bytes, tuple[np.ndarray, np.ndarray, int]]] = [{} for _ in asked]
    parts: list[tuple[str, list[int], Examples, list[tuple[int, bytes]]]] = []
    for name, task in several.tasks.items():
        mine = [row for row, each in enumerate(asked) if name in each.inputs]
        # A tokenizer takes texts or pairs, not a mixture.
        for group in ([r for r in mine if (asked[r].inputs[name][1] is None) == alone] for alone in (True, False)):
            if not group:
                continue
            taken = [asked[row].inputs[name] for row in group]
            pairs = None if taken[0][1] is None else [beside for _, beside in taken]
            own = Rows(rows.split, rows.path, [text for text, _ in taken], None, rows.lines[group], pairs=pairs)
            made = task.examples(own, tokenizer, max_length, labelled=False)
            keys = []
            for number in range(len(made.store)):
                row = group[number if made.row_of is None else int(made.row_of[number])]
                key, sequence = _sequence(made.store, number)
                # The first window of one task may be the cut text of another.
                cut = max(_cut(made, number, tokenizer, max_length), found[row].get(key, (None, None, 0))[2])
                found[row][key] = (*sequence, cut)
                keys.append((row, key))
            parts.append((name, group, made, keys))
    numbers: dict[tuple[int, bytes], int] = {}
    for row, sequences in enumerate(found):
        for key in sequences:
            numbers[row, key] = len(numbers)
    each = [sequence for sequences in found for sequence in sequences.values()]
    offsets = np.cumsum([0, *(len(ids) for ids, _, _ in each)]).astype(np.int64)
    cuts = np.array([cut for _, _, cut in each], dtype=np.int64)
    store = TokenStore(
        np.concatenate([ids for ids, _, _ in each]).astype(np.int32) if each else np.zeros(0, np.int32),
        offsets,
        np.concatenate([types for _, types, _ in each]).astype(np.uint8) if each and tokenizer.token_types else None,
        int((cuts > 0).sum()),
        int(cuts.sum()),
    )
    return AskedExamples(
        rows,
        store,
        None,
        np.ones(len(store), dtype=np.float32),
        row_of=np.array([row for row, _ in numbers], dtype=np.int64),
        cuts=cuts,
        asked=tuple(Part(name, group, made, [numbers[key] for key in keys]) for name, group, made, keys in parts),
    )


def _asked(several: Several, rows: Rows, row: int) -> Asked:
    beside = None if rows.pairs is None else rows.pairs[row]
    if isinstance(beside, Asked):
        return beside
    item = {"text": rows.texts[row]} | ({} if beside is None else {"text_pair": beside})
    try:
        return take(several, item)[1]
    except ValueError as error:
        raise DataError(f"{rows.where(row)}: {error}") from None


def _sequence(store: TokenStore, number: int) -> tuple[bytes, tuple[np.ndarray, np.ndarray]]:
    span = slice(int(store.offsets[number]), int(store.offsets[number + 1]))
    ids = np.asarray(store.ids[span], dtype=np.int32)
    types = np.zeros(len(ids), np.uint8) if store.types is None else np.asarray(store.types[span], dtype=np.uint8)
    return ids.tobytes() + types.tobytes(), (ids, types)


def _cut(made: Examples, number: int, tokenizer: FastTokenizer, max_length: int) -> int:
    """Tokens that did not fit a sequence."""
    if made.cuts is not None:
        return int(made.cuts[number])
    if made.row_of is not None or not made.store.truncated or int(made.store.lengths[number]) < max_length:
        return 0
    texts = [made.rows.texts[number]] + ([] if made.rows.pairs is None else [made.rows.pairs[number]])
    return len(tokenizer.backend.encode(*texts)) - max_length
