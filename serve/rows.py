"""Requests for a task that makes its own sequences: windows of long texts, questions with contexts, choices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regraft.engine.bundle import BundleInfo
from regraft.engine.data.fast_tokenizer import FastTokenizer
from regraft.engine.data.rows import Rows
from regraft.engine.errors import BundleError, DataError
from regraft.engine.tasks import Task
from regraft.serve.tokens import NOT_UNICODE, Encoded, Prepared, is_unicode


def load_bundled(folder: Path, info: BundleInfo) -> FastTokenizer:
    """A bundle's tokenizer as tasks take it. Raises BundleError."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise BundleError(f"{path}: not a tokenizer file: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    return FastTokenizer(backend, info.max_length, info.pad_token_id, info.token_types, "right", "")


def prepare_rows(
    task: Task, tokenizer: FastTokenizer | None, max_length: int, texts: Sequence[str], beside: Sequence[Any]
) -> Prepared:
    """Items of all inputs that can be read; the others have a problem and harm no other."""
    assert tokenizer is not None
    problems: dict[int, str] = {}
    for i, (text, other) in enumerate(zip(texts, beside, strict=True)):
        if not all(map(is_unicode, _strings(text, other))):
            problems[i] = NOT_UNICODE.problem or ""
    readable = [i for i in range(len(texts)) if i not in problems]
    try:
        made = _examples(task, tokenizer, max_length, [texts[i] for i in readable], [beside[i] for i in readable])
    except (DataError, ValueError):
        # One of them is at fault: find out which, so that the others are answered.
        for i in readable:
            try:
                _examples(task, tokenizer, max_length, [texts[i]], [beside[i]])
            except (DataError, ValueError) as error:
                problems[i] = str(error)
        readable = [i for i in readable if i not in problems]
        made = _examples(task, tokenizer, max_length, [texts[i] for i in readable], [beside[i] for i in readable])
    if not readable:
        return Prepared(len(texts), [], [], problems)
    store = made.store
    rows = np.arange(len(store)) if made.row_of is None else made.row_of
    items = []
    for s in range(len(store)):
        span = slice(store.offsets[s], store.offsets[s + 1])
        types = np.zeros(span.stop - span.start, dtype=np.int64) if store.types is None else store.types[span]
        marks = None if made.marks is None else np.flatnonzero(made.marks[span])
        cut = int(made.cuts[s]) if made.cuts is not None else store.cut_tokens if len(store) == 1 else 0
        items.append(Encoded(store.ids[span].astype(np.int64), types.astype(np.int64), cut, None, marks))
    return Prepared(len(texts), items, [readable[r] for r in rows], problems, made)


def _examples(task: Task, tokenizer: FastTokenizer, max_length: int, texts: list[str], beside: list[Any]) -> Any:
    if not texts:
        return None
    pairs = None if all(other is None for other in beside) else beside
    rows = Rows("request", "<request>", texts, None, np.arange(1, len(texts) + 1), pairs=pairs)
    return task.examples(rows, tokenizer, max_length, labelled=False)


def _strings(text: str, beside: Any) -> list[str]:
    """A request's texts: its own, and those that stand beside it."""
    if isinstance(beside, str):
        return [text, beside]
    return [text, *(part for part in getattr(beside, "strings", beside or ()) if isinstance(part, str))]
