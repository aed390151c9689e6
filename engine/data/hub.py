"""Rows of a Hugging Face dataset: `hub:NAME` or `hub:NAME#split`, where NAME may be a local folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regraft.engine.config import DataConfig
from regraft.engine.data.cells import PARQUET_ROWS, Cells, Table, use_columns
from regraft.engine.data.reach import offline_if_unreachable
from regraft.engine.data.source import HUB
from regraft.engine.errors import DataError, nearest

SPLIT_NAMES = {"train": ("train",), "dev": ("validation", "dev", "valid", "val"), "test": ("test",)}


@contextmanager
def open_hub(address: str, data: DataConfig, *, split: str, need_labels: bool) -> Iterator[Table]:
    """Cells of one split; class numbers come as names where the dataset knows them, -1 (no label) as None.

    `split` is train, dev or test; what follows # in the address goes before it, and may be a slice (`train[:10%]`).
    Raises DataError when `datasets` is not installed, the dataset cannot be had, or it has no such split or column.
    """
    name, _, asked = address.removeprefix(HUB).partition("#")
    dataset = _load(name, data.hub_config, asked, SPLIT_NAMES.get(split, (split,)), address)
    use = use_columns(data, dataset.column_names, address, need_labels)
    names = _class_names(dataset.features[use[2]]) if use[2] is not None else None
    chosen = dataset.select_columns([column for column in use if column is not None])
    yield Table(_cells(chosen, use, names), use[2] is not None)


def _load(name: str, config: str | None, asked: str, splits: tuple[str, ...], address: str) -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        import datasets
    except ImportError:
        raise DataError(f"{address}: needs the `datasets` package: pip install 'regraft[hub]'") from None
    local = Path(name).exists()
    if not local and name.startswith((".", "/", "~")):
        raise DataError(f"{address}: no such folder: {name}")
    try:
        if Path(name, "dataset_info.json").is_file() or Path(name, "dataset_dict.json").is_file():
            found = datasets.load_from_disk(name)
        elif local:
            found = datasets.load_dataset(name, config, split=asked or None)
        else:
            with offline_if_unreachable():
                found = datasets.load_dataset(name, config, split=asked or None)
    except Exception as error:  # whatever a loader may raise, the user needs the address and the reason
        raise DataError(f"{address}: {_why_not(local, error)}") from None
    if isinstance(found, datasets.Dataset):
        return found
    splits = (asked,) if asked else splits
    for split in splits:
        if split in found:
            return found[split]
    hint = nearest(splits[0], found)
    raise DataError(f"{address}: no split {splits[0]!r}{hint}; it has {', '.join(found)}: write hub:{name}#SPLIT")


def _why_not(local: bool, error: Exception) -> str:
    told = " ".join(str(error).split())
    told = told[:300] + ("..." if len(told) > 300 else "")
    if local:
        return f"the folder cannot be read as a dataset: {told}"
    if isinstance(error, OSError):  # what a dead network, an offline switch and an unknown name all come to
        return f"not in the local cache, and not to be had from the hub (no network, or no such dataset): {told}"
    return f"cannot be loaded: {type(error).__name__}: {told}"


def _class_names(feature: Any) -> list[str] | None:
    feature = getattr(feature, "feature", feature)  # of a list of labels
    if isinstance(feature, list):
        feature = feature[0]
    return getattr(feature, "names", None)


def _cells(dataset: Any, use: tuple[str, str | None, str | None], names: list[str] | None) -> Iterator[Cells]:
    number = 0
    for piece in dataset.iter(batch_size=PARQUET_ROWS):
        nothing = [None] * len(piece[use[0]])
        columns = [nothing if c is None else piece[c] for c in use]
        for text, pair, label in zip(*columns, strict=True):
            number += 1
            yield number, text, pair, label if names is None else _named(label, names)


def _named(label: Any, names: list[str]) -> Any:
    if isinstance(label, list):
        return [names[one] for one in label]
    return None if label is None or label < 0 else names[label]


def first_rows(address: str, count: int) -> dict[str | int, list[Any]]:
    """The first rows of the train split, or the one after #, column by column; class numbers as names."""
    name, _, asked = address.removeprefix(HUB).partition("#")
    dataset = _load(name, None, asked, SPLIT_NAMES["train"], address)
    columns: dict[str | int, list[Any]] = {}
    for column, values in dataset[:count].items():
        names = _class_names(dataset.features[column])
        columns[column] = values if names is None else [_named(value, names) for value in values]
    return columns
