"""Overload must refuse, not break (text-embeddings-inference 470, 744, 811); a list is admitted whole or not at all
(text-embeddings-inference 662)."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx

import serving_support  # noqa: F401
from bundles import bundle
from regraft.serve.scheduler import Run
from running import Gate, over_http, running_server

GOOD = {"inputs": "good film"}  # four tokens


def gated(gates: list[Gate]):
    def wrap(run: Run) -> Gate:
        gates.append(Gate(run))
        return gates[0]

    return wrap


def test_what_finds_no_room_gets_429_with_retry_after_and_the_rest_is_answered() -> None:
    gates: list[Gate] = []

    async def talk(client: httpx.AsyncClient) -> None:
        running = asyncio.create_task(client.post("/predict", json=GOOD))
        await gates[0].await_batch()
        waiting = [asyncio.create_task(client.post("/predict", json=GOOD)) for _ in range(2)]
        while (await client.get("/ready")).json()["waiting_tokens"] < 8:
            await asyncio.sleep(0.001)
        refused = await client.post("/predict", json=GOOD)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        gates[0].open(10)
        assert [(await task).status_code for task in [running, *waiting]] == [200] * 3
        assert (await client.post("/predict", json=GOOD)).status_code == 200

    over_http(talk, run=gated(gates), queue_tokens=8)


def test_a_list_without_room_for_all_of_it_is_refused_before_any_of_it_runs() -> None:
    gates: list[Gate] = []

    async def talk(client: httpx.AsyncClient) -> None:
        running = asyncio.create_task(client.post("/predict", json=GOOD))
        await gates[0].await_batch()
        waiting = asyncio.create_task(client.post("/predict", json=GOOD))
        while (await client.get("/ready")).json()["waiting_tokens"] < 4:
            await asyncio.sleep(0.001)
        refused = await client.post("/predict", json={"inputs": ["good film", "bad film", "the film"]})
        assert refused.status_code == 429
        gates[0].open(10)
        assert (await running).status_code == (await waiting).status_code == 200
        whole = await client.post("/predict", json={"inputs": ["good film", "bad film", "the film"]})
        assert len(whole.json()["predictions"]) == 3

    over_http(talk, run=gated(gates), queue_tokens=12)
    assert gates[0].batches == [1, 1, 3]


def test_a_real_server_under_a_flood_answers_or_refuses_every_request_and_lives() -> None:
    async def flood(url: str) -> Counter[int]:
        limits = httpx.Limits(max_connections=60)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
            body = {"inputs": ["good film " * 9] * 8}
            answers = await asyncio.gather(*(client.post("/predict", json=body) for _ in range(150)))
            for answer in answers:
                assert answer.status_code == 200 or int(answer.headers["retry-after"]) >= 1
            assert (await client.get("/ready")).status_code == 200
            assert (await client.post("/predict", json=GOOD)).status_code == 200
            return Counter(answer.status_code for answer in answers)

    with running_server(bundle(work=20), "--queue-tokens", "640", "--max-batch-tokens", "160") as server:
        statuses = asyncio.run(flood(server.url))
    assert set(statuses) == {200, 429}
    assert sum(statuses.values()) == 150


def test_texts_that_wait_for_the_tokenizer_are_bounded_too(monkeypatch) -> None:
    import threading

    from bundles import session

    model, gate, begun = session(), threading.Event(), threading.Event()
    tokenize = model.tokenize

    def slow(texts, pairs=None):
        begun.set()
        assert gate.wait(20)
        return tokenize(texts, pairs)

    async def talk(client: httpx.AsyncClient) -> None:
        first = asyncio.create_task(client.post("/predict", json={"inputs": "good " * 100}))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        refused = await client.post("/predict", json={"inputs": "good " * 100})
        assert refused.status_code == 429 and "tokenizer" in refused.json()["error"]["message"]
        gate.set()
        assert (await first).status_code == 200

    probe = model.probe()
    monkeypatch.setattr(model, "probe", lambda: probe)
    monkeypatch.setattr(model, "tokenize", slow)
    over_http(talk, queue_tokens=30)
