"""Labelled rows of a trained model: a file the user names, or those its training held out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from regraft.engine.config import DataConfig, changed_data
from regraft.engine.data.read import read_split
from regraft.engine.data.rows import Rows
from regraft.engine.data.source import suited_to
from regraft.engine.data.split import split_dev
from regraft.engine.errors import ConfigError, DataError
from regraft.engine.examples import Examples
from regraft.engine.files import file_sha256
from regraft.engine.trained import Trained


def data_sections(trained: Trained) -> list[DataConfig]:
    """What says where the model's rows are: of every task, for a model that has several."""
    if "tasks" not in trained.facts or trained.task.type != "several":
        return [trained.data]
    from regraft.engine.several.data import data_of

    return [data_of(trained, name) for name in trained.facts["tasks"]]


def read_otherwise(
    trained: Trained, overrides: Sequence[str], file: str | None, *, split: str | None = None
) -> Trained:
    """The model, its rows read as `--set data.KEY=VALUE` says; `file` and `split` as in `heldout_rows`.

    Raises ConfigError where that could not be done, or would call rows held out that were learned from.
    """
    if overrides and trained.task.type == "several":
        raise ConfigError(f"--set {overrides[0]}: each task has rows of its own; name one with --task")
    data = changed_data(trained.data, list(overrides))
    if overrides and file is None and _are_carved(data, _split_of(data, split)):
        raise ConfigError(
            f"--set {overrides[0]}: the rows are those that training held out of {trained.data.train}, and read otherwise "
            "they would be others; name a file of rows, or --set data.dev=FILE"
        )
    return replace(trained, data=data)


def _split_of(data: DataConfig, split: str | None) -> str:
    return split or ("test" if data.test else "dev")


def _are_carved(data: DataConfig, split: str) -> bool:
    return split == "dev" and data.dev is None


def heldout_rows(trained: Trained, file: str | None, *, split: str | None = None) -> Rows:
    """Rows of `file`; without one, of the named split, or of test if the run had one and dev otherwise.

    Raises DataError when the run's own files are gone or have changed place.
    """
    data, task = trained.task.like_training(trained.data), type(trained.task)
    if file is not None:
        return task.read(file, suited_to(file, data), split="test")
    split = _split_of(data, split)
    if _are_carved(data, split):
        _refuse_other_rows(trained, data.train)
        train = read_split(task, data, "train")
        return split_dev(train, data.dev_fraction, trained.facts["seed"], task.kind())[1]
    return read_split(task, data, split)


def _refuse_other_rows(trained: Trained, train: str) -> None:
    """Raise DataError where the run's folder says that the training file was another one then."""
    mark = trained.folder.parent / "run.json"
    if trained.folder.name != "best" or not mark.is_file() or not Path(train).is_file():
        return
    then = json.loads(mark.read_text(encoding="utf-8")).get("data", {}).get(train)
    if then is not None and file_sha256(Path(train)) != then:
        raise DataError(
            f"{train}: changed since the run in {mark.parent} began, so which of its rows were held out cannot be told; "
            "name a file of rows"
        )


def encoded(trained: Trained, rows: Rows) -> Examples:
    """The rows' sequences and targets, by the rules the model was trained with."""
    data = trained.data
    made = trained.task.examples(
        rows, trained.tokenizer, trained.max_length, label_column=data.columns.label, unknown=data.unknown_label
    )
    if not len(made):
        raise DataError(f"{rows.path}: no row is left after the rules in data: {made.rows.dropped}")
    return made


def heldout_examples(trained: Trained, file: str | None, *, split: str | None = None) -> Examples:
    """The same of `heldout_rows`, ready for the model; of every task, for a model that has several."""
    if "tasks" not in trained.facts or trained.task.type != "several":
        return encoded(trained, heldout_rows(trained, file, split=split))
    from regraft.engine.several.data import heldout_of_all

    if file is not None:
        names = ", ".join(trained.facts["tasks"])
        raise DataError(f"{file}: its rows are of one task; name it with --task: {names}")
    return heldout_of_all(trained, split)
