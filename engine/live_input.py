"""Texts from a pipe or a terminal, answered as they come and not when a chunk of them is full."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Thread
from typing import IO, Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None


def is_live(stream: Any) -> bool:
    """Whether more may come while what has come could be answered: a pipe, a socket or a terminal, not a file."""
    try:
        return not stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (AttributeError, OSError):  # a stream in memory
        return False


def reopened(stream: Any) -> IO[bytes]:
    """The same bytes by an object of its own: at exit Python closes standard input's, and would wait for its reader."""
    return open(stream.fileno(), "rb", closefd=False)


def as_they_come(texts: Iterator[T], most: int, before_waiting: Callable[[], Any]) -> Iterator[list[T]]:
    """What has come of `texts` since the list before, at least one and at most `most` in a list.

    `texts` runs in a thread, `most` ahead and no further; its error is raised after what came before it.
    `before_waiting` is called whenever nothing is there.
    """
    come: Queue[T | _End] = Queue(most)

    def read() -> None:
        try:
            for text in texts:
                come.put(text)
            come.put(_End())
        except BaseException as error:
            come.put(_End(error))

    Thread(target=read, name="regraft-read", daemon=True).start()
    end: _End | None = None
    while end is None:
        if come.empty():
            before_waiting()
        chunk: list[T] = []
        item: T | _End | None = come.get()
        while item is not None:
            if isinstance(item, _End):
                end = item
                break
            chunk.append(item)
            item = _there(come) if len(chunk) < most else None
        if chunk:
            yield chunk
    if end.error is not None:
        raise end.error


def _there(come: Queue[T | _End]) -> T | _End | None:
    try:
        return come.get_nowait()
    except Empty:
        return None
