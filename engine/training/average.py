"""Gradients of several processes, averaged once a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MESSAGE_BYTES = 32 << 20  # enough that a network's latency does not show, and little beside the gradients


@torch.no_grad()
def average_over_processes(gradients: Sequence[Tensor], processes: int) -> None:
    """Mean of every gradient over all processes, in place and in few messages; every process has to call.

    Nothing is sent before a process has all of its own gradients, so one that runs out of memory can begin its share of the
    step again without the others noticing; and forward and backward hold no communication that a graph would have to capture.
    """
    if processes < 2:
        return
    import torch.distributed as dist

    for mine in _messages(gradients):
        flat = torch._utils._flatten_dense_tensors(mine)
        dist.all_reduce(flat)
        flat /= processes
        torch._foreach_copy_(mine, list(torch._utils._unflatten_dense_tensors(flat, mine)))


def _messages(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype that are sent together."""
    for dtype in dict.fromkeys(g.dtype for g in gradients):
        message: list[Tensor] = []
        size = 0
        for gradient in (g for g in gradients if g.dtype == dtype):
            if message and size + gradient.nbytes > MESSAGE_BYTES:
                yield message
                message, size = [], 0
            message.append(gradient)
            size += gradient.nbytes
        if message:
            yield message
