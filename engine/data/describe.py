"""What a person wants to know of labelled rows before training on them, in a few lines."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from regraft.engine.data.rows import Rows
from regraft.engine.label_names import name_of

TOKENS_A_WORD = 1.4  # of English in a vocabulary of 30,000


@dataclass(frozen=True)
class Description:
    """`labels`, `lengths`: a sentence each. `imbalance`: rows of the largest class for each of the smallest, 1 for a
    regression. `longest`: about how many tokens the longest text has; `over_512`: share of rows with more than 512."""

    labels: str
    lengths: str
    imbalance: float
    longest: int
    over_512: float


def describe(rows: Rows, task_type: str) -> Description:
    """Rows must have labels; those of a regression are numbers."""
    words = np.array([_words(text) for text in rows.texts])
    if rows.pairs is not None:
        words = words + np.array([_words(text) for text in rows.pairs])
    tokens = words * TOKENS_A_WORD
    middle, high, longest = np.quantile(words, [0.5, 0.95, 1.0]).astype(int)
    labels, imbalance = _labels(rows, task_type)
    return Description(
        labels=labels,
        lengths=f"{middle:,} words in the middle, {high:,} at the 95th percentile, {longest:,} at most",
        imbalance=imbalance,
        longest=int(tokens.max()),
        over_512=float((tokens > 512).mean()),
    )


def _words(text: str) -> int:
    # A script without spaces: every character beyond Latin, Greek, Cyrillic and their neighbours counts as a word.
    wide = sum(c >= "\u2e80" for c in text) if not text.isascii() else 0
    return len(text.split()) + wide


def _labels(rows: Rows, task_type: str) -> tuple[str, float]:
    labels: Any = rows.labels
    if task_type == "regression":
        values = np.array([float(value) for value in labels])
        return f"numbers from {values.min():g} to {values.max():g}, {values.mean():.3g} on average", 1.0
    if task_type == "multilabel":
        counts = Counter(name_of(label) for row in labels for label in row)
        none = sum(not row for row in labels)
        told = f"{len(counts)} labels, {sum(counts.values()) / len(rows):.2f} a row"
        told += f", {none:,} rows have none" if none else ""
    else:
        counts = Counter(map(name_of, labels))
        told = f"{len(counts)} class{'es' * (len(counts) != 1)}"
    if not counts:
        return told, 1.0
    ordered = counts.most_common()
    (largest, most), (smallest, least) = ordered[0], ordered[-1]
    told += f"; largest {largest[:40]!r} with {most:,} rows ({most / len(rows):.0%})"
    told += f", smallest {smallest[:40]!r} with {least:,}" if len(counts) > 1 else ""
    return told, most / least
