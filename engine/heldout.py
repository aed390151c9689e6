"""Labelled rows of a trained model: a file the user names, or those its training held out."""

from __future__ import annotations

import numpy as np

from regraft.engine.data.cache import cache_folder
from regraft.engine.data.read import read_file, read_rows
from regraft.engine.data.rows import Rows
from regraft.engine.data.split import split_dev
from regraft.engine.data.tokens import TokenStore, tokenize
from regraft.engine.errors import DataError
from regraft.engine.trained import Trained


def heldout_rows(trained: Trained, file: str | None, *, split: str | None = None) -> Rows:
    """Rows of `file`; without one, of the named split, or of test if the run had one and dev otherwise.

    Raises DataError when the run's own files are gone or have changed place.
    """
    data, kind = trained.data, trained.task.type
    if file is not None:
        return read_file(file, data, split="test", task_type=kind)
    split = split or ("test" if data.test else "dev")
    if split == "dev" and data.dev is None:
        train = read_rows(data, "train", task_type=kind)
        return split_dev(train, data.dev_fraction, trained.facts["seed"], kind)[1]
    return read_rows(data, split, task_type=kind)


def encoded(trained: Trained, rows: Rows) -> tuple[Rows, TokenStore, np.ndarray]:
    """Rows, tokens and targets, in the same order, by the rules the model was trained with."""
    targets, kept = trained.task.encode(rows, trained.data.columns.label, trained.data.unknown_label)
    if len(kept) < len(rows):
        rows = rows.take(kept, dropped={**rows.dropped, "unknown_label": len(rows) - len(kept)})
    if not len(rows):
        raise DataError(f"{rows.path}: no row is left after the rules in data: {rows.dropped}")
    return rows, tokenize(rows, trained.tokenizer, trained.max_length, cache_dir=cache_folder()), targets
