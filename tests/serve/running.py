"""Servers, applications and a model whose runs a test lets through one by one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np

from bundles import session
from regraft.serve.http import create_app
from regraft.serve.scheduler import Run, Scheduler
from regraft.serve.settings import ServeSettings
from regraft.serve.tokens import Encoded

T = TypeVar("T")
PATIENCE = 20.0  # seconds that no healthy test comes near


def item(tokens: int, mark: int = 0) -> Encoded:
    """An item that a `GatedModel` answers with its mark."""
    return Encoded(np.full(tokens, mark, dtype=np.int64), np.zeros(tokens, dtype=np.int64))


PROBE = item(1, mark=-1)


class GatedModel:
    """Answers each item with its mark, but every batch waits until the test opens the gate for it.

    Negative marks are probes: they pass at once and are not recorded. `faults` maps a mark to what to raise.
    """

    def __init__(self, faults: dict[int, BaseException] | None = None) -> None:
        self.faults = faults or {}
        self.batches: list[list[int]] = []
        self.probes = 0
        self._begun = threading.Semaphore(0)
        self._gate = threading.Semaphore(0)

    def __call__(self, items: Sequence[Encoded]) -> np.ndarray:
        marks = [int(i.ids[0]) for i in items]
        if marks[0] < 0:
            self.probes += 1
        else:
            self.batches.append(marks)
            self._begun.release()
            assert self._gate.acquire(timeout=PATIENCE), "the test never opened the gate"
        for mark in marks:
            if mark in self.faults:
                raise self.faults[mark]
        return np.array([[mark] for mark in marks], dtype=np.float32)

    def await_batch(self) -> None:
        """Returns when one more batch has reached the gate."""
        assert self._begun.acquire(timeout=PATIENCE), "no batch was started"

    def open(self, batches: int = 1) -> None:
        self._gate.release(batches)


class Gate:
    """A real model's run, every batch of which waits until the test opens the gate for it. Not to be probed."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.batches: list[int] = []  # items of each
        self._gate = threading.Semaphore(0)

    def __call__(self, items: Sequence[Encoded]) -> np.ndarray:
        self.batches.append(len(items))
        assert self._gate.acquire(timeout=PATIENCE), "the test never opened the gate"
        return self.run(items)

    def open(self, batches: int = 1) -> None:
        self._gate.release(batches)

    async def await_batch(self, number: int = 1) -> None:
        """Returns when so many batches have reached the gate in all."""
        while len(self.batches) < number:
            await asyncio.sleep(0.001)


@contextmanager
def scheduling(run: Run, *, max_batch_tokens: int = 10, queue_tokens: int = 100, **options: Any) -> Iterator[Scheduler]:
    """A started scheduler that is stopped afterwards. It does not probe when idle unless asked to."""
    options = {"probe": PROBE, "probe_every": 3600.0, **options}
    scheduler = Scheduler(run, max_batch_tokens=max_batch_tokens, queue_tokens=queue_tokens, **options).start()
    try:
        yield scheduler
    finally:
        if isinstance(run, GatedModel | Gate):
            run.open(10_000)
        scheduler.stop(grace=PATIENCE)


def over_http(
    talk: Callable[[httpx.AsyncClient], Awaitable[T]],
    *,
    task: str = "classification",
    layout: str = "packed",
    run: Callable[[Run], Run] = lambda run: run,
    pairs: bool | None = None,
    **settings: Any,
) -> T:
    """What `talk` returns after talking to the application, in this process. `run` may wrap the model's run; `pairs`:
    what the bundle says it learned from."""
    model, chosen = copy(session(layout, task)), ServeSettings(**{"probe_every": 3600.0, **settings})
    model.info = replace(model.info, pairs=pairs)

    async def main() -> T:
        transport = httpx.ASGITransport(create_app(model, scheduler, chosen))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=PATIENCE) as client:
            return await talk(client)

    with scheduling(
        run(model.run),
        probe=model.probe(),
        max_batch_tokens=chosen.max_batch_tokens,
        queue_tokens=chosen.queue_tokens,
        stall=chosen.stall,
        probe_every=chosen.probe_every,
    ) as scheduler:
        return asyncio.run(main())


def post(body: Any, **options: Any) -> httpx.Response:
    """The answer to one POST /predict, in this process."""
    content = json.dumps(body)  # in ASCII: half a surrogate pair can be sent like this
    headers = {"content-type": "application/json"}
    return over_http(lambda client: client.post("/predict", content=content, headers=headers), **options)


@dataclass(frozen=True)
class Running:
    """A server in a process of its own."""

    url: str
    process: subprocess.Popen[str]


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "regraft.serve", str(folder), "--port", "0", "--threads", "1", *arguments]


@contextmanager
def running_server(folder: Path, *arguments: str) -> Iterator[Running]:
    """A real server on a free port, ready to answer; ended when the test is done with it."""
    process = subprocess.Popen(
        command(folder, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"ready on (http://\S+)\n", line)
        assert found, f"first line {line!r}; {process.stderr.read() if not line else ''}"
        yield Running(found[1], process)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
