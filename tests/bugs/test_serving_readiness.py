"""A backend died, health stayed green and requests hung (infinity 483, 544)."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

import serving_support  # noqa: F401
from regraft.serve.scheduler import Run
from regraft.serve.tickets import NotReady, Ticket
from running import PATIENCE, GatedModel, item, over_http, scheduling


def refusal(ticket: Ticket) -> str:
    with pytest.raises(NotReady) as refused:
        ticket.future.result(PATIENCE)
    return str(refused.value)


def test_when_the_worker_dies_everybody_is_told_and_nobody_is_admitted() -> None:
    model = GatedModel({1: SystemExit("killed")})
    with scheduling(model) as scheduler:
        running = scheduler.submit([item(10, 1)])
        waiting = scheduler.submit([item(10, 2), item(10, 3)])
        model.open()
        assert "the worker died: SystemExit: killed" in refusal(running)
        assert "the worker died" in refusal(waiting)
        assert "the worker died" in str(scheduler.problem())
        with pytest.raises(NotReady, match="the worker died"):
            scheduler.submit([item(1)])


def test_when_the_model_hangs_everybody_is_told_and_an_answer_makes_it_ready_again() -> None:
    now = 0.0
    model = GatedModel()
    with scheduling(model, stall=10.0, clock=lambda: now) as scheduler:
        running, waiting = scheduler.submit([item(10, 1)]), scheduler.submit([item(10, 2)])
        model.await_batch()
        now = 9.0
        assert scheduler.check() is None
        now = 11.0
        assert scheduler.check() == "the model has not answered for 10 s"
        assert "has not answered" in refusal(running) and "has not answered" in refusal(waiting)
        with pytest.raises(NotReady):
            scheduler.submit([item(1)])
        model.open()
        while scheduler.check() is not None:
            time.sleep(0.001)
        model.open()
        assert int(scheduler.submit([item(1, 3)]).future.result(PATIENCE).rows[0][0]) == 3
    assert model.batches == [[1], [3]]


class Switch:
    """A model that fails on everything while it is switched off."""

    def __init__(self, run: Run) -> None:
        self.run, self.off = run, False

    def __call__(self, items: list) -> object:
        if self.off:
            raise RuntimeError("device lost")
        return self.run(items)


def test_a_model_that_fails_on_everything_is_not_ready_until_it_answers_again() -> None:
    switches: list[Switch] = []

    def wrapped(run: Run) -> Switch:
        switches.append(Switch(run))
        return switches[0]

    async def talk(client: httpx.AsyncClient) -> list[int]:
        statuses = [(await client.get("/ready")).status_code]
        switches[0].off = True
        statuses.append((await client.post("/predict", json={"inputs": "good"})).status_code)
        deadline = time.monotonic() + 5
        while (ready := await client.get("/ready")).status_code == 200 and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert "device lost" in ready.json()["error"]["message"]
        statuses += [ready.status_code, (await client.get("/health")).status_code]
        statuses.append((await client.post("/predict", json={"inputs": "good"})).status_code)
        switches[0].off = False
        while (await client.get("/ready")).status_code != 200:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        statuses.append((await client.post("/predict", json={"inputs": "good"})).status_code)
        return statuses

    first, failing, *rest = over_http(talk, run=wrapped, probe_every=0.05)
    assert failing in (500, 503)  # the request met the failure itself, or the probe was faster
    assert [first, *rest] == [200, 503, 200, 503, 200]


def test_one_text_that_the_model_cannot_answer_leaves_it_ready() -> None:
    async def talk(client: httpx.AsyncClient) -> list[int]:
        bad = await client.post("/predict", json={"inputs": "beyond"})
        return [bad.status_code, (await client.get("/ready")).status_code]

    assert over_http(talk) == [500, 200]


def test_a_dead_worker_answers_requests_over_http_and_turns_readiness_red() -> None:
    def dies(_: list) -> object:
        raise SystemExit("killed")

    async def talk(client: httpx.AsyncClient) -> tuple[set[int], int, int]:
        answers = await asyncio.gather(*(client.post("/predict", json={"inputs": "good"}) for _ in range(5)))
        ready, health = await client.get("/ready"), await client.get("/health")
        return {answer.status_code for answer in answers}, ready.status_code, health.status_code

    assert over_http(talk, run=lambda _: dies) == ({503}, 503, 200)
