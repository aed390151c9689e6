"""A part of the training rows: stratified, seeded, and nested, so that a learning curve adds rows and swaps none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from regraft.engine.config import RunConfig
from regraft.engine.data.rows import Rows
from regraft.engine.tasks import Tagging, Task, task_class
from regraft.engine.training.splits import Splits, read_parts, read_splits


def part_of(targets: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Row numbers of about `share` of the rows, ascending: at least one of each class (of single-label rows), and
    those of a smaller share with the same seed."""
    draw = np.random.Generator(np.random.Philox(key=[seed, 77]))
    order = draw.permutation(len(targets))
    if share >= 1:
        return np.arange(len(targets))
    if targets.ndim > 1 or targets.dtype.kind == "f":
        return np.sort(order[: max(2, round(share * len(targets)))])
    taken = []
    for label in np.unique(targets):
        mine = order[targets[order] == label]
        taken.append(mine[: max(1, round(share * len(mine)))])
    return np.sort(np.concatenate(taken))


def fold_of(targets: np.ndarray, folds: int) -> np.ndarray:
    """Which of `folds` parts each row is held out in, [N]; classes spread evenly, always alike."""
    draw = np.random.Generator(np.random.Philox(key=[folds, 79]))
    order = draw.permutation(len(targets))
    if targets.ndim == 1 and targets.dtype.kind != "f":
        order = order[np.argsort(targets[order], kind="stable")]
    fold = np.empty(len(targets), dtype=np.int64)
    fold[order] = np.arange(len(targets)) % folds
    return fold


def splits_of(config: RunConfig) -> tuple[Task, Splits]:
    """Task, rows and targets of every split; of tags the targets are all 0: rows of one kind, as parts are drawn.

    Raises DataError, and ConfigError for a task that cannot be compared.
    """
    if task_class(config.task.type) is not Tagging:
        return read_splits(config)
    task, parts = read_parts(config)
    splits: Splits = {}
    for name, rows in parts.items():
        _, kept = task.encode(
            rows, config.data.columns.label, "error" if name == "train" else config.data.unknown_label
        )
        splits[name] = (rows.take(kept), np.zeros(len(kept), dtype=np.int64))
    return task, splits


def write_rows(path: Path, rows: Rows, columns: dict[str, Any], task: Task) -> None:
    """The rows as jsonl under the names of `columns`."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(len(rows)):
            row: dict[str, Any] = {columns["text"]: rows.texts[i], columns["label"]: (rows.labels or [])[i]}
            if isinstance(task, Tagging):
                row = _tagged(task, rows, i, columns)
            elif rows.pairs is not None:
                row[columns["text_pair"]] = rows.pairs[i]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _tagged(task: Tagging, rows: Rows, row: int, columns: dict[str, Any]) -> dict[str, Any]:
    """Words with their tags, where the source gave words; else the text with its spans."""
    text, spans = rows.texts[row], (rows.labels or [])[row]
    words = None if rows.pairs is None else rows.pairs[row]
    if words is None:
        return {columns["text"]: text, columns["label"]: [list(span) for span in spans]}
    tags = [task.labels[n] for n in task.encode(rows.take(np.array([row])))[0][0]]
    return {columns["text"]: [text[start:end] for start, end in words], columns["label"]: tags}
