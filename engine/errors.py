"""Errors that a user can act on: what was found where, what was expected, and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class RegraftError(Exception):
    """Base of every error that is the user's to solve. The command line prints it without a traceback, exit code 2."""


class ConfigError(RegraftError):
    """A run configuration that cannot be used."""


class DataError(RegraftError):
    """Rows that cannot be used."""


class ModelError(RegraftError):
    """A model folder or name that cannot be used."""


class TrainingError(RegraftError):
    """A training run that cannot go on; its run folder is intact."""


class MemoryShortError(TrainingError):
    """A training run that does not fit into memory as it is set up."""


class LostProcessError(TrainingError):
    """Of several processes, one that ends because another is gone; that one's own error says why."""


class NotFiniteError(RegraftError):
    """A model whose outputs are NaN or infinite."""


class ExportError(RegraftError):
    """An export that was refused; nothing was written."""


class StoreError(RegraftError):
    """A feature store that cannot be used; its finished shards are intact unless the message names one."""


class BundleError(RegraftError):
    """A bundle that cannot be served."""


def at(path: str | Path, line: int | None = None, column: str | int | None = None) -> str:
    """`file:line, column 'x'`, for the start of a message."""
    place = str(path)
    if line is not None:
        place += f":{line}"
    if column is not None:
        place += f", column {column!r}"
    return place


def nearest(name: str, valid: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no valid name is near."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""
