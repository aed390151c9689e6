"""Which texts run next. One worker thread owns the model; whenever it is free it takes whatever waits.

Late binding: a batch is formed at the moment the model can start it, so there is no timer and nobody waits for a
batch to fill. Every ticket that was admitted is answered, whatever happens to the worker.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from regraft.serve.tickets import Failure, NotReady, Overloaded, Slot, Ticket, TooLarge
from regraft.serve.tokens import Encoded

STOPPING = "the server is stopping"

Run = Callable[[Sequence[Encoded]], Sequence[np.ndarray]]


class Scheduler:
    """Queue, admission and worker.

    `run` answers a batch: items [B] -> logits [B, C], or one array an item. `probe` is an item that a sound model can answer; the worker
    runs it after a batch of which nothing succeeded and every `probe_every` seconds of idleness. A batch holds at
    most `max_batch_tokens` tokens (a longer single item stands alone), the queue at most `queue_tokens`.
    """

    def __init__(
        self,
        run: Run,
        *,
        probe: Encoded,
        max_batch_tokens: int,
        queue_tokens: int,
        stall: float = 20.0,
        probe_every: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._probe, self._clock = run, probe, clock
        self._max_batch_tokens, self._queue_tokens = max_batch_tokens, queue_tokens
        self._stall, self._probe_every = stall, probe_every
        self._changed = threading.Condition()
        # Guarded by _changed. A dict keeps the order and lets a cancelled ticket leave from the middle at once.
        self._waiting: dict[Ticket, None] = {}
        self._waiting_tokens = 0
        self._running: tuple[Slot, ...] = ()
        self._busy_since: float | None = None
        self._expected = 0  # tickets that are being made
        self._stopping = False
        self._broken: str | None = None  # why the model cannot answer; cleared by an answer
        self._dead: str | None = None
        self._recent_tokens = self._recent_seconds = 0.0  # decaying sums
        self._worker = threading.Thread(target=self._work, name="regraft-model", daemon=True)

    def start(self) -> Scheduler:
        self._worker.start()
        return self

    # -- for whoever brings requests ------------------------------------------------------------------------------

    def submit(self, items: Sequence[Encoded]) -> Ticket:
        """Admit all items or none. Raises Overloaded, TooLarge or NotReady."""
        with self._changed:
            self._refuse_if_stopping()
            return self._admit(items)

    @contextmanager
    def expecting(self) -> Iterator[Callable[[Sequence[Encoded]], Ticket]]:
        """For items that are still to be made: gives `submit` for them, which a stop that comes meanwhile waits for. Raises
        what `submit` would raise for one token, which spares making them for nothing."""
        with self._changed:
            self._refuse_if_stopping()
            self._refuse(1)
            self._expected += 1
        try:
            yield self._admit
        finally:
            with self._changed:
                self._expected -= 1
                if self._is_done():
                    self._changed.notify_all()

    def _admit(self, items: Sequence[Encoded]) -> Ticket:
        if not items:
            raise ValueError("a ticket needs at least one item")
        ticket = Ticket(items, self._clock())
        tokens = ticket.waiting_tokens
        with self._changed:
            self._refuse(tokens)
            self._waiting[ticket] = None
            self._waiting_tokens += tokens
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """What still waits of the ticket never runs; what runs already is dropped."""
        ticket.future.cancel()
        with self._changed:
            self._withdraw(ticket)

    def problem(self) -> str | None:
        """Why the model cannot answer now; None when it can."""
        with self._changed:
            return self._problem() or (STOPPING if self._stopping else None)

    def check(self) -> str | None:
        """`problem()`, and when the worker hangs everybody who waits is told. Called every second or so."""
        problem = self.problem()
        if problem is not None and self._hung():
            self._refuse_everyone(problem)
        return problem

    @property
    def waiting_tokens(self) -> int:
        return self._waiting_tokens

    @property
    def rate(self) -> float:
        """Tokens a second over the last ten batches or so; 0 before the first."""
        return self._recent_tokens / self._recent_seconds if self._recent_seconds else 0.0

    def stop(self, grace: float) -> bool:
        """Refuse new tickets, answer what waits or is expected within `grace` seconds, refuse the rest. True when all was
        answered."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._worker.is_alive():
            self._worker.join(grace)
        finished = not self._worker.is_alive()
        problem = f"the server stopped before this was answered (grace of {grace:g} s is over)"
        if not finished:
            with self._changed:
                self._dead = self._dead or problem
        self._refuse_everyone(problem)
        return finished

    # -- the worker -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (batch := self._next_batch()) is not None:
                if batch:
                    self._answer(batch)
                else:
                    self._try_probe()
        except BaseException as error:
            with self._changed:
                self._dead = f"the worker died: {type(error).__name__}: {error}"
                problem = self._dead
            self._refuse_everyone(problem)

    def _next_batch(self) -> tuple[Slot, ...] | None:
        """Wait for work and take what fits. Empty: nothing came for a while, time to probe. None: stopped."""
        with self._changed:
            patience = self._probe_every if self._broken is None else min(1.0, self._probe_every)
            self._changed.wait_for(lambda: self._waiting or self._is_done(), timeout=patience)
            if not self._waiting:
                return None if self._is_done() else ()
            batch: list[Slot] = []
            tokens = 0
            while self._waiting:
                ticket = next(iter(self._waiting))
                need = ticket.items[ticket.taken].tokens
                if batch and tokens + need > self._max_batch_tokens:
                    break
                batch.append(Slot(ticket, ticket.taken))
                tokens += need
                ticket.taken += 1
                if ticket.taken == len(ticket.items):
                    del self._waiting[ticket]
            self._waiting_tokens -= tokens
            self._running = tuple(batch)
            self._busy_since = self._clock()
            return self._running

    def _answer(self, batch: tuple[Slot, ...]) -> None:
        started = self._clock()
        rows = self._rows([slot.item for slot in batch])
        took = self._clock() - started
        sound = not all(isinstance(row, Failure) for row in rows)
        with self._changed:
            self._busy_since = None
            if sound:
                self._broken = None
                self._recent_tokens = 0.9 * self._recent_tokens + sum(slot.item.tokens for slot in batch)
                self._recent_seconds = 0.9 * self._recent_seconds + max(took, 1e-6)
        for ticket in dict.fromkeys(slot.ticket for slot in batch):
            ticket.started = started if ticket.started is None else ticket.started
            ticket.inference += took
        for slot, row in zip(batch, rows, strict=True):
            slot.ticket.rows[slot.index] = row
            slot.ticket.missing -= 1
            if not slot.ticket.missing:
                slot.ticket.finish()
        with self._changed:
            self._running = ()
        if not sound:
            self._try_probe()

    def _rows(self, items: Sequence[Encoded]) -> list[np.ndarray | Failure]:
        """Answers of a batch. One that fails is halved until the items at fault stand alone."""
        try:
            logits = self._run(items)
            if len(logits) != len(items):
                raise RuntimeError(f"the model gave {len(logits)} answers for {len(items)} items")
        except Exception as error:
            if len(items) == 1:
                return [Failure(f"the model failed on this item: {_first_line(error)}")]
            half = len(items) // 2
            return self._rows(items[:half]) + self._rows(items[half:])
        not_finite = Failure("the model gave a number that is not finite")
        return [row if np.isfinite(row).all() else not_finite for row in logits]

    def _try_probe(self) -> None:
        """Can the model answer at all? If not, nobody is left waiting for it."""
        with self._changed:
            self._busy_since = self._clock()
        row = self._rows([self._probe])[0]
        broken = f"the model cannot answer: {row.message}" if isinstance(row, Failure) else None
        with self._changed:
            self._busy_since, self._broken = None, broken
        if broken is not None:
            self._refuse_everyone(broken)

    # -- with _changed held ---------------------------------------------------------------------------------------

    def _refuse_if_stopping(self) -> None:
        if self._stopping:
            raise NotReady(STOPPING)

    def _refuse(self, tokens: int) -> None:
        if (problem := self._problem()) is not None:
            raise NotReady(problem)
        if tokens > self._queue_tokens:
            raise TooLarge(f"{tokens} tokens in one request; at most {self._queue_tokens} are taken at a time")
        over = self._waiting_tokens + tokens - self._queue_tokens
        if over > 0:
            seconds = math.ceil(over / self.rate) if self.rate else 1
            raise Overloaded(
                f"{self._waiting_tokens} tokens wait already and the queue takes {self._queue_tokens}",
                min(max(seconds, 1), 60),
            )

    def _problem(self) -> str | None:
        if self._dead is not None:
            return self._dead
        if self._hung():
            return f"the model has not answered for {self._stall:g} s"
        return self._broken

    def _is_done(self) -> bool:
        return self._stopping and not self._expected

    def _hung(self) -> bool:
        since = self._busy_since
        return since is not None and self._clock() - since > self._stall

    def _withdraw(self, ticket: Ticket) -> None:
        if ticket in self._waiting:
            del self._waiting[ticket]
            self._waiting_tokens -= ticket.waiting_tokens

    # -- answers, outside the lock --------------------------------------------------------------------------------

    def _refuse_everyone(self, problem: str) -> None:
        with self._changed:
            tickets = dict.fromkeys([*(slot.ticket for slot in self._running), *self._waiting])
            self._waiting.clear()
            self._waiting_tokens = 0
        for ticket in tickets:
            ticket.refuse(problem)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
