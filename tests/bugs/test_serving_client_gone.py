"""The client is gone and its work goes on (triton server 7077, 7532): what still waits must never run."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx

import serving_support  # noqa: F401
from bundles import bundle, session
from regraft.serve.http import create_app
from running import Gate, running_server, scheduling


async def call(app: Any, body: dict[str, Any], leave: asyncio.Event) -> list[dict[str, Any]]:
    """One POST /predict whose client leaves when `leave` is set; what the application sent until then."""
    content = json.dumps(body).encode()
    incoming = [{"type": "http.request", "body": content, "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop()
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/predict",
        "raw_path": b"/predict",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())],
        "scheme": "http",
        "http_version": "1.1",
    }
    await app(scope, receive, send)
    return sent


def test_a_request_whose_client_leaves_while_it_waits_is_never_run() -> None:
    model = session()
    gate = Gate(model.run)

    async def main() -> None:
        app = create_app(model, scheduler)
        stay, leave = asyncio.Event(), asyncio.Event()
        running = asyncio.create_task(call(app, {"inputs": "good"}, stay))
        await gate.await_batch()
        leaving = asyncio.create_task(call(app, {"inputs": ["bad", "bad", "bad"]}, leave))
        while scheduler.waiting_tokens < 9:
            await asyncio.sleep(0.001)
        leave.set()
        await leaving
        assert scheduler.waiting_tokens == 0
        gate.open(10)
        assert (await running)[0]["status"] == 200

    with scheduling(gate, probe=model.probe(), max_batch_tokens=100) as scheduler:
        asyncio.run(main())
    assert gate.batches == [1]


def test_a_client_that_leaves_while_its_own_batch_runs_does_no_harm() -> None:
    model = session()
    gate = Gate(model.run)

    async def main() -> None:
        app = create_app(model, scheduler)
        stay, leave = asyncio.Event(), asyncio.Event()
        leaving = asyncio.create_task(call(app, {"inputs": "good"}, leave))
        await gate.await_batch()
        leave.set()
        await leaving
        gate.open(10)
        assert (await call(app, {"inputs": "good"}, stay))[0]["status"] == 200

    with scheduling(gate, probe=model.probe(), max_batch_tokens=100) as scheduler:
        asyncio.run(main())


def test_a_real_server_drops_the_queue_of_a_closed_connection() -> None:
    body = json.dumps({"inputs": ["good film " * 9] * 200}).encode()
    head = f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with running_server(bundle(work=200), "--max-batch-tokens", "20") as server, httpx.Client() as client:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(head.encode() + body)
            while not client.get(f"{server.url}/ready").json()["waiting_tokens"]:
                time.sleep(0.005)
        # Its 200 batches would run for several seconds more.
        began = time.monotonic()
        while client.get(f"{server.url}/ready").json()["waiting_tokens"]:
            time.sleep(0.005)
        assert time.monotonic() - began < 1.0
        answer = client.post(f"{server.url}/predict", json={"inputs": "good"}).json()
        assert answer["times"]["queue_ms"] < 1000
