"""Labelled rows of a trained model: a file the user names, or those its training held out."""

from __future__ import annotations

from regraft.engine.config import DataConfig
from regraft.engine.data.read import read_split
from regraft.engine.data.rows import Rows
from regraft.engine.data.source import suited_to
from regraft.engine.data.split import split_dev
from regraft.engine.errors import DataError
from regraft.engine.examples import Examples
from regraft.engine.trained import Trained


def data_sections(trained: Trained) -> list[DataConfig]:
    """What says where the model's rows are: of every task, for a model that has several."""
    if "tasks" not in trained.facts or trained.task.type != "several":
        return [trained.data]
    from regraft.engine.several.data import data_of

    return [data_of(trained, name) for name in trained.facts["tasks"]]


def heldout_rows(trained: Trained, file: str | None, *, split: str | None = None) -> Rows:
    """Rows of `file`; without one, of the named split, or of test if the run had one and dev otherwise.

    Raises DataError when the run's own files are gone or have changed place.
    """
    data, task = trained.task.like_training(trained.data), type(trained.task)
    if file is not None:
        return task.read(file, suited_to(file, data), split="test")
    split = split or ("test" if data.test else "dev")
    if split == "dev" and data.dev is None:
        train = read_split(task, data, "train")
        return split_dev(train, data.dev_fraction, trained.facts["seed"], task.kind())[1]
    return read_split(task, data, split)


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
