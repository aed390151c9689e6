"""Milliseconds of a kernel on a GPU: replayed as a CUDA graph over data that the L2 cache cannot hold from call to call.

A call is short, so launches from Python would be most of what a clock sees; a graph holds many calls and one launch.
Calls take turns over several copies of their inputs, and their outputs are kept as long, so that each finds its data in
memory, as it does within a step. Forward, backward and capture share one stream: a backward that went forward on another
cannot be captured.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

QUANTILES = (0.5, 0.2, 0.8)
REPLAYS = 10
MILLISECONDS = 10.0  # of calls in one graph
MOST_COPIES = 128


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, 20 and 80 percent. `timer`: 'graph', 'events' with the reason, or 'clock'."""

    median: float
    low: float
    high: float
    timer: str


def own_stream(device: str) -> AbstractContextManager[Any]:
    """A stream of its own for a block of measurements; None on CPU."""
    if device == "cpu":
        return nullcontext()
    from regraft.kernels.capture import on_stream

    return on_stream(torch.cuda.Stream())


def copies_for(bytes_a_call: float, device: str) -> int:
    """How many copies of a call's data are three times the L2 cache."""
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(MOST_COPIES, max(1, math.ceil(3 * cache / max(1.0, bytes_a_call))))


def timed(runs: Sequence[Callable[[], object]], device: str, stream: Any = None) -> Timing:
    """Of one call; `runs` do the same on copies of the data. On a GPU the caller is on `stream`, and its forward was."""
    if device == "cpu":
        return clock(runs)
    try:
        return graph(runs, stream)
    except Exception as error:
        text = str(error).strip().splitlines()
        why = f"{type(error).__name__}: {text[0][:120] if text else ''}"
    return events(runs, why)


def graph(runs: Sequence[Callable[[], object]], stream: Any) -> Timing:
    from regraft.kernels.capture import capture

    kept: deque[object] = deque(maxlen=len(runs))

    def each(calls: int) -> None:
        for number in range(calls):
            kept.append(runs[number % len(runs)]())

    each(len(runs))  # compiles, tunes, lets libraries set themselves up
    estimate = elapsed(lambda: each(len(runs))) / len(runs)
    rounds = max(1, round(MILLISECONDS / max(estimate, 1e-3) / len(runs)))
    calls = len(runs) * rounds
    kept.clear()
    replayed = capture(lambda: each(calls), stream=stream).replay
    replayed()
    times = [elapsed(replayed) / calls for _ in range(REPLAYS)]
    return Timing(*(quantile(times, q) for q in QUANTILES), "graph")


def elapsed(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def events(runs: Sequence[Callable[[], object]], why: str) -> Timing:
    """One call at a time between two events, the L2 cache cleared before each; launches count."""
    from triton.testing import do_bench

    found = do_bench(runs[0], warmup=5, rep=40, quantiles=list(QUANTILES))
    return Timing(*found, f"events: {why}")


def clock(runs: Sequence[Callable[[], object]]) -> Timing:
    found = []
    for _ in range(3):
        began = time.perf_counter()
        runs[0]()
        found.append((time.perf_counter() - began) * 1e3)
    return Timing(statistics.median(found), min(found), max(found), "clock")


def quantile(values: Sequence[float], q: float) -> float:
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), q))
