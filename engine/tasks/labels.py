"""Label names: found in data, matched to rows. A label that is not known is an error that names the row."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from regraft.engine.data.rows import Rows
from regraft.engine.errors import ConfigError, DataError, nearest
from regraft.engine.label_names import name_of

NUMBER = re.compile(r"-?\d+")
DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
TRUTH = ("true", "false")  # in JSON and parquet; a csv says True or TRUE


def value_of(name: str) -> float | None:
    """The number that a label's name spells; None for any other name."""
    return float(name) if DECIMAL.fullmatch(name) else None


def in_order(names: set[str]) -> tuple[str, ...]:
    """Whole numbers by value, anything else by name: the same order for the same set of labels, always."""
    if all(map(NUMBER.fullmatch, names)):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def find_names(train: Rows, label_column: str | int) -> tuple[str, ...]:
    """Label names of a single-label column."""
    if train.labels is None:
        raise DataError(f"{train.path}: no label column {label_column!r}")
    return in_order({name_of(value) for value in train.labels})


def index_by_name(labels: tuple[str, ...], *, numbered: bool) -> dict[str, int]:
    """Name to number. `numbered`: the user listed the names, and so a number in the data means a place in that list.

    Names that were found in data have no such order: 0 is nobody's label there.
    """
    index: dict[str, int] = {}
    if numbered and not any(value_of(n) is not None for n in labels):
        index = {str(i): i for i in range(len(labels))}
    index |= {name_of(name): i for i, name in enumerate(labels)}
    for name in [name for name in index if name.lower() in TRUTH]:
        for spelling in (name.lower(), name.title(), name.upper()):
            index.setdefault(spelling, index[name])
    return index


def unknown_label(labels: tuple[str, ...], rows: Rows, row: int, label_column: str | int, name: str) -> DataError:
    shown = ", ".join(labels[:8]) + (f", ... ({len(labels)} in all)" if len(labels) > 8 else "")
    return DataError(
        f"{rows.where(row, label_column)}: label {name!r} is not one that training knows{nearest(name, labels)}; known: {shown}. "
        "Set data.unknown_label: drop to leave such rows out (they are counted)"
    )


def label_index(
    labels: tuple[str, ...], rows: Rows, label_column: str | int, unknown: str, *, numbered: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Class numbers [N'] int64 and the rows kept [N'] int64."""
    if rows.labels is None:
        raise DataError(f"{rows.path}: no label column {label_column!r}")
    index = index_by_name(labels, numbered=numbered)
    numbers = np.fromiter((index.get(name_of(v), -1) for v in rows.labels), dtype=np.int64, count=len(rows))
    kept = np.flatnonzero(numbers >= 0)
    if len(kept) < len(numbers) and unknown == "error":
        row = int(np.flatnonzero(numbers < 0)[0])
        raise unknown_label(labels, rows, row, label_column, name_of(rows.labels[row]))
    return numbers[kept], kept


def named_weights(given: Mapping[str, float], names: tuple[str, ...], train: Rows) -> np.ndarray:
    """A weight for each label, 1 where none is given, [C] float32. Raises ConfigError for a name that is no label."""
    for name in given:
        if name not in names:
            raise ConfigError(f"task.class_weights: {name!r} is not a label of {train.path}{nearest(name, names)}")
    return np.array([given.get(name, 1.0) for name in names], dtype=np.float32)
