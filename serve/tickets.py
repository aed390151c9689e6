"""What goes through the queue and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from regraft.serve.tokens import Encoded


class Refused(Exception):
    """The request was not run, or not to its end."""


class Overloaded(Refused):
    """No room in the queue now; worth trying again after `retry_after` whole seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooLarge(Refused):
    """The list has more tokens than the queue ever takes."""


class NotReady(Refused):
    """The model cannot answer: the worker died, hangs or fails, or the server is stopping."""


@dataclass(frozen=True)
class Failure:
    """What is said about an item that could not be answered."""

    message: str


@dataclass(frozen=True)
class Outcome:
    """Answers of one ticket: for each item its logits [C] float32 or a Failure. Seconds it waited for its first batch
    and seconds of model time of the batches it was in."""

    rows: tuple[np.ndarray | Failure, ...]
    queue: float
    inference: float


class Ticket:
    """One admitted request. `future` gives its Outcome, or raises Refused."""

    def __init__(self, items: Sequence[Encoded], submitted: float) -> None:
        self.items = tuple(items)
        self.future: Future[Outcome] = Future()
        self.submitted = submitted
        self.started: float | None = None
        self.taken = 0  # items handed to the worker so far
        self.inference = 0.0
        self.rows: list[np.ndarray | Failure | None] = [None] * len(self.items)
        self.missing = len(self.items)

    @property
    def waiting_tokens(self) -> int:
        return sum(item.tokens for item in self.items[self.taken :])

    def finish(self) -> None:
        """Hand out the answers, unless the client is gone or was refused in the meantime."""
        rows = tuple(row for row in self.rows if row is not None)
        started = self.submitted if self.started is None else self.started
        with suppress(InvalidStateError):
            self.future.set_result(Outcome(rows, started - self.submitted, self.inference))

    def refuse(self, problem: str) -> None:
        """Say that there will be no answer, unless there was one."""
        with suppress(InvalidStateError):
            self.future.set_exception(NotReady(problem))


@dataclass(frozen=True)
class Slot:
    """One item of a batch: where its answer goes."""

    ticket: Ticket
    index: int

    @property
    def item(self) -> Encoded:
        return self.ticket.items[self.index]
