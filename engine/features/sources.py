"""What features are computed of: texts as they stand, or the sequences of tokens that a task makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regraft.engine.config import RunConfig
from regraft.engine.data.fast_tokenizer import FastTokenizer
from regraft.engine.data.rows import Rows
from regraft.engine.data.tokens import TokenStore, encode
from regraft.engine.errors import ConfigError
from regraft.engine.examples import Examples
from regraft.engine.features.header import KEY_BYTES
from regraft.engine.features.rows import FeatureRows
from regraft.engine.features.spec import FeatureSpec
from regraft.engine.features.store import row_keys
from regraft.engine.tasks import Task, task_class
from regraft.engine.tasks.base import FIRST, MARKED
from regraft.engine.training.splits import read_parts, read_splits

Source = Rows | TokenStore


def keys_of(source: Source) -> np.ndarray:
    """What identifies each text, or each sequence of tokens, [N, 16] uint8."""
    if isinstance(source, Rows):
        return row_keys(source)
    blake, joined = hashlib.blake2b, []
    for start, end in zip(source.offsets[:-1], source.offsets[1:], strict=True):
        content = source.ids[start:end].astype("<i4").tobytes()
        if source.types is not None and source.types[start:end].any():
            content += source.types[start:end].tobytes()
        joined.append(blake(content, digest_size=KEY_BYTES, person=b"tokens").digest())
    return np.frombuffer(b"".join(joined), dtype=np.uint8).reshape(-1, KEY_BYTES)


class Sources:
    """Everything that is to be encoded, split after split, all of one kind."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.stores = [p for p in parts if isinstance(p, TokenStore)]
        rows = [p for p in parts if isinstance(p, Rows)]
        self.texts = [text for part in rows for text in part.texts]
        self.pairs = (
            [pair for part in rows for pair in part.pairs or ()] if rows and rows[0].pairs is not None else None
        )
        self.first = np.cumsum([0, *map(len, self.stores)])

    def sizes(self) -> np.ndarray:
        """How long each text is, in characters, or each sequence, in tokens."""
        if self.stores:
            return np.concatenate([store.lengths for store in self.stores])
        return np.asarray([len(text) for text in self.texts], dtype=np.int64)

    def tokens(self, rows: np.ndarray, tokenizer: FastTokenizer, max_length: int) -> TokenStore:
        """Those of some rows, numbered through all splits."""
        if not self.stores:
            pairs = None if self.pairs is None else [self.pairs[r] for r in rows]
            return encode([self.texts[r] for r in rows], pairs, tokenizer, max_length)
        owner = np.searchsorted(self.first, rows, side="right") - 1
        parts = [(self.stores[o], int(r - self.first[o])) for o, r in zip(owner, rows, strict=True)]
        ids = [store.sequence(r) for store, r in parts]
        offsets = np.concatenate([[0], np.cumsum([len(x) for x in ids], dtype=np.int64)])
        types = None
        if any(store.types is not None for store, _ in parts):
            types = np.concatenate([_types(store, r) for store, r in parts])
        return TokenStore(np.concatenate(ids), offsets, types)


def _types(store: TokenStore, row: int) -> np.ndarray:
    start, end = store.offsets[row], store.offsets[row + 1]
    return np.zeros(end - start, dtype=np.uint8) if store.types is None else store.types[start:end]


@dataclass(frozen=True)
class Part:
    """A split whose features are not there yet. `learned(features)`: what is learned from, once they are."""

    source: Source
    learned: Callable[[FeatureRows], Examples]
    note: dict[str, Any]


def parts_of(config: RunConfig, spec: FeatureSpec, tokenizer: FastTokenizer) -> tuple[Task, dict[str, Part]]:
    """The task and every split of a run on stored features.

    One answer a text: texts are the source, and nothing is tokenised where their features are there. Another task makes
    its sequences first (windows of a long text, a question with its context). Raises DataError, and ConfigError for a
    task whose head reads the vocabulary.
    """
    kind = task_class(config.task.type)
    if kind.reads == MARKED:
        raise ConfigError(
            f"task.type: {config.task.type}: its head is over the vocabulary and learns with the encoder; it has no "
            "features to store. Use method: full or lora"
        )
    if kind.reads == FIRST and kind.examples is Task.examples:
        task, splits = read_splits(config)
        return task, {name: _of_texts(task, *part) for name, part in splits.items()}
    from regraft.engine.training.setup import examples_of

    task, rows = read_parts(config)
    made, notes = examples_of(config, task, rows, tokenizer, spec.max_length)
    return task, {name: _of_sequences(made[name], notes[name]) for name in made}


def _of_texts(task: Task, rows: Rows, targets: np.ndarray) -> Part:
    counts = task.label_counts(targets)

    def learned(features: FeatureRows) -> Examples:
        return Examples(rows, _as_store(features), targets, task.weights(targets), counts=counts)

    return Part(rows, learned, {"path": rows.path, "rows": len(rows), "dropped": dict(rows.dropped), "labels": counts})


def _of_sequences(made: Examples, note: dict[str, Any]) -> Part:
    return Part(made.store, lambda features: made.over(_as_store(features)), note)


def _as_store(features: FeatureRows) -> Any:
    """Stored features where an Examples has its tokens: they know lengths and offsets, and make batches of themselves."""
    return features
