"""Memory that ratchets up with every new shape (fastembed 222, 483; text-embeddings-inference 156)."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import psutil

import serving_support  # noqa: F401
from bundles import bundle
from running import running_server

MEBIBYTE = 1 << 20


def test_resident_memory_is_flat_over_many_mixed_lengths() -> None:
    rng = np.random.default_rng(3)

    async def soak(url: str, requests: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            for _ in range(requests // 10):
                bodies = [
                    {"inputs": ["good " * int(n) for n in rng.integers(0, 60, size=rng.integers(1, 40))]}
                    for _ in range(10)
                ]
                answers = await asyncio.gather(*(client.post("/predict", json=body) for body in bodies))
                assert {answer.status_code for answer in answers} == {200}

    with running_server(bundle()) as server:
        process = psutil.Process(server.process.pid)
        asyncio.run(soak(server.url, 150))
        settled = process.memory_info().rss
        asyncio.run(soak(server.url, 450))
        grown = process.memory_info().rss - settled
    assert grown < 4 * MEBIBYTE, f"{grown / MEBIBYTE:.1f} MiB more after 450 further requests"
