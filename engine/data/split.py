"""A dev split carved out of the training rows: stratified, seeded, and with no text on both sides."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from regraft.engine.data.rows import Rows
from regraft.engine.errors import DataError
from regraft.engine.label_names import name_of

BINS = 10  # of a regression's values


def split_dev(rows: Rows, fraction: float, seed: int, task_type: str) -> tuple[Rows, Rows]:
    """Train and dev rows, each in the order of `rows`; dev gets about `fraction` of every class.

    Rows with the same text (and pair) stay together. Which are chosen follows from their text and `seed` alone, so
    it is the same on every machine and changes little when rows are added. Every class that has two different texts
    is on both sides; a class with one is in train.
    Raises DataError when there is nothing to carve.
    """
    groups = _same_text(rows)
    strata = _strata(rows, [members[0] for members in groups], task_type)
    classes: dict[Any, list[int]] = {}
    for number, stratum in enumerate(strata):
        classes.setdefault(stratum, []).append(number)
    sizes = {name: sum(len(groups[g]) for g in members) for name, members in classes.items()}
    dev: list[int] = []
    for name, wanted in _quotas(sizes, fraction).items():
        ordered = sorted(classes[name], key=lambda g: _rank(rows, groups[g][0], seed))
        dev.extend(_take(ordered, groups, max(1, wanted)))
    if not dev:
        raise DataError(
            f"{rows.path}: no dev rows can be carved out of {len(rows)} rows, {len(groups)} texts in {len(classes)} "
            "classes: every class needs two different texts; set data.dev to a file"
        )
    chosen = np.zeros(len(rows), dtype=bool)
    for group in dev:
        chosen[groups[group]] = True
    dev_rows = rows.take(np.flatnonzero(chosen), split="dev", dropped={})
    return rows.take(np.flatnonzero(~chosen)), replace(dev_rows, carved=True)


def _same_text(rows: Rows) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    keys = rows.texts if rows.pairs is None else zip(rows.texts, rows.pairs, strict=True)
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def _strata(rows: Rows, first: Sequence[int], task_type: str) -> list[Any]:
    if rows.labels is None:
        return [None] * len(first)
    labels = [rows.labels[i] for i in first]
    if task_type == "regression":
        return _value_bins(rows, first, labels)
    if task_type == "multilabel":  # the rarest label of a row is the one that a careless split would lose
        count = Counter(str(name) for names in labels for name in names)
        return [min((str(n) for n in names), key=lambda n: (count[n], n), default="") for names in labels]
    if task_type != "classification":  # no classes to keep apart
        return [0] * len(first)
    return [name_of(label) for label in labels]


def _value_bins(rows: Rows, first: Sequence[int], labels: Sequence[Any]) -> list[int]:
    values = np.empty(len(labels))
    for i, label in enumerate(labels):
        try:
            values[i] = float(label)
        except (TypeError, ValueError):
            raise DataError(f"{rows.where(first[i])}: {label!r} is not a number") from None
    bins = min(BINS, max(1, len(values) // 4))
    edges = np.unique(np.quantile(values, np.arange(1, bins) / bins))
    return np.searchsorted(edges, values, side="right").tolist()


def _quotas(sizes: dict[Any, int], fraction: float) -> dict[Any, int]:
    # Largest remainder: every class is within one row of its share, and the whole is right.
    shares = {name: size * fraction for name, size in sizes.items()}
    quotas = {name: int(share) for name, share in shares.items()}
    left = max(1, round(sum(sizes.values()) * fraction)) - sum(quotas.values())
    by_remainder = sorted(shares, key=lambda name: (quotas[name] - shares[name], str(name)))
    for name in by_remainder[: max(0, left)]:
        quotas[name] += 1
    return quotas


def _rank(rows: Rows, row: int, seed: int) -> bytes:
    pair = "" if rows.pairs is None else rows.pairs[row]
    content = f"{seed}\0{rows.texts[row]}\0{pair}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=16).digest()


def _take(ordered: Sequence[int], groups: Sequence[Sequence[int]], wanted: int) -> list[int]:
    if len(ordered) < 2:
        return []
    taken: list[int] = []
    rows = 0
    for group in ordered:
        if rows + len(groups[group]) <= wanted:
            taken.append(group)
            rows += len(groups[group])
        if rows == wanted or len(taken) == len(ordered) - 1:
            break
    return taken or [min(ordered, key=lambda g: len(groups[g]))]
