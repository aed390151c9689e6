"""Work captured as a CUDA graph, on a stream of its own; where it cannot be captured, torch is left as it was before.

A capture that fails leaves traces in torch (2.11) that later work trips over: its stream stays the current one; the
random generator goes on taking itself for captured, so that the next draw and the replay of any earlier graph raise;
and the allocator keeps the memory of the graph that never was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

# The allocator may ask a graph whose capture failed whether it is being captured: it must not be gone by then.
_failed: list[Any] = []


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[torch.cuda.Stream]:
    """Work in this block runs on `stream`, after all that came before the block and before all that comes after it."""
    before = torch.cuda.current_stream()
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield stream
    finally:
        before.wait_stream(stream)


def capture(run: Callable[[], Any], *, warm_up: int = 0, pool: Any = None, stream: Any = None) -> torch.cuda.CUDAGraph:
    """`run` as a graph, after `warm_up` calls that are not captured. Random numbers go on as if there had been neither.

    `pool`: of an earlier graph, to share its memory. `stream`: to capture on; whatever `run` goes backward through must
    have gone forward there. Raises what `run` raises, or the capture.
    """
    pool = pool or torch.cuda.graph_pool_handle()
    random = torch.cuda.get_rng_state()
    graph = torch.cuda.CUDAGraph()
    try:
        with on_stream(stream or torch.cuda.Stream()) as beside:
            for _ in range(warm_up):
                run()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=beside):
                    run()
            except BaseException as error:
                _recover(graph, pool)
                # The end of a capture that failed says no more than that it had; what it failed of came before.
                raise (error.__context__ or error) from None
    finally:
        torch.cuda.set_rng_state(random)
    return graph


def _recover(graph: Any, pool: Any) -> None:
    _failed.append(graph)
    device = torch.cuda.current_device()
    with suppress(Exception):  # it may have come far enough to do so itself
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    try:
        # The end of a capture that succeeds tells the generator what the failed one's did not.
        one = torch.zeros(1, device="cuda")
        with on_stream(torch.cuda.Stream()) as beside, torch.cuda.graph(torch.cuda.CUDAGraph(), stream=beside):
            one.add_(1)
    except Exception:
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())
    torch.cuda.synchronize()
