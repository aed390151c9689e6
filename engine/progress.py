"""Progress that a person can read: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

LINE_EVERY_SECONDS = 10.0


class ProgressBar:
    """Counts towards `total`, with rate, time left and a few figures. Writes to standard error."""

    def __init__(self, title: str, total: int, *, done: int = 0, shown: bool = True) -> None:
        self.title, self.total, self.done, self.shown = title, total, done, shown
        self._figures: dict[str, str] = {}
        self._started = self._last_line = time.monotonic()
        self._begun_at = done
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self.shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, figures="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, count: int = 1, **figures: str) -> None:
        """`count` more are done; `figures` are shown behind the bar."""
        self.done += count
        self._figures |= figures
        if not self.shown:
            return
        if self._bar:
            self._bar.update(self._task, completed=self.done, figures=self._text())
        elif time.monotonic() - self._last_line >= LINE_EVERY_SECONDS or self.done == self.total:
            self._last_line = time.monotonic()
            self.say(f"{self.title} {self.done}/{self.total}  {self._left()}  {self._text()}".rstrip())

    def say(self, line: str) -> None:
        """A line above the bar."""
        if not self.shown:
            return
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _text(self) -> str:
        return "  ".join(f"{name.replace('_', ' ')} {value}" for name, value in self._figures.items())

    def _left(self) -> str:
        ran = self.done - self._begun_at
        if ran <= 0:
            return ""
        seconds = (time.monotonic() - self._started) / ran * (self.total - self.done)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"
