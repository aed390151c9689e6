"""What torch.cuda does when work is captured, as far as a failed capture leaves traces in torch 2.11, without a GPU."""

from __future__ import annotations

from contextlib import contextmanager

import torch


class FakeCuda:
    """Streams by number (0: the default one); one random generator; captures that fail where a draw is not captured."""

    def __init__(self) -> None:
        self.current, self.streams, self.capturing_stream = 0, 0, None
        self.taken_for_captured = False  # the generator's own belief
        self.offset = 0
        self.allocating: set[int] = set()
        self.graphs: list[Graph] = []

    def draw(self) -> int:
        """A random number, or the node of a graph that draws one."""
        if self.capturing_stream is None:
            if self.taken_for_captured:
                raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
            self.offset += 4
        return self.offset

    def sync(self) -> None:
        """What no graph can hold, such as reading a value on the host."""
        if self.capturing_stream is not None:
            raise RuntimeError("operation not permitted when stream is capturing")


class Stream:
    def __init__(self, cuda: FakeCuda, number: int) -> None:
        self.cuda, self.number = cuda, number

    def wait_stream(self, other: Stream) -> None:
        assert self.cuda.capturing_stream is None, "a capture goes on"


class Graph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.whole = cuda, False

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    def replay(self) -> None:
        assert self.whole
        self.cuda.draw()


def install(monkeypatch) -> FakeCuda:
    """Put it in torch.cuda's place for a test."""
    cuda = FakeCuda()

    def new_stream() -> Stream:
        cuda.streams += 1
        return Stream(cuda, cuda.streams)

    @contextmanager
    def stream(chosen: Stream):
        before, cuda.current = cuda.current, chosen.number
        try:
            yield
        finally:
            cuda.current = before

    class graph:
        def __init__(self, made: Graph, pool=None, stream: Stream | None = None) -> None:
            self.made, self.pool, self.stream = made, pool or (0, 99), stream or new_stream()

        def __enter__(self) -> None:
            self.before = cuda.current
            cuda.current = cuda.capturing_stream = self.stream.number
            cuda.taken_for_captured = True
            cuda.allocating.add(self.pool)

        def __exit__(self, kind, *_) -> None:
            cuda.capturing_stream = None
            if kind is not None:  # nothing below is done: that is the fault
                raise RuntimeError("operation failed due to a previous error during capture")
            cuda.allocating.discard(self.pool)
            cuda.taken_for_captured = False
            cuda.current = self.before
            self.made.whole = True

    def end(device: int, pool) -> None:
        if pool not in cuda.allocating:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        cuda.allocating.discard(pool)

    class Event:
        def __init__(self, **_: object) -> None: ...

        def record(self) -> None: ...

        def elapsed_time(self, _: Event) -> float:
            return 1.0

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *s, device=None, **o: zeros(*s, **o))
    fakes = {
        "Stream": new_stream, "stream": stream, "graph": graph, "CUDAGraph": lambda: Graph(cuda),
        "current_stream": lambda: Stream(cuda, cuda.current), "current_device": lambda: 0, "synchronize": lambda: None, "Event": Event,
        "graph_pool_handle": lambda: (0, 1), "get_rng_state": lambda: cuda.offset,
        "set_rng_state": lambda offset: setattr(cuda, "offset", offset),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: None, raising=False)
    return cuda
