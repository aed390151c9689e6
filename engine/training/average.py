"""Gradients of several processes, averaged once a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from regraft.engine.training.common_memory import CommonMemory

MESSAGE_BYTES = 32 << 20  # enough that a network's latency does not show, and little beside the gradients
SHARED_BYTES = 8 << 20  # of a message in shared memory: it stays in the processor's caches
LINE = 64  # bytes of a cache's line


class Piece(NamedTuple):
    """Numbers `start` to `end` of tensor `number`."""

    number: int
    start: int
    end: int


Message = list[list[Piece]]  # by process: what it sums up


class Average:
    """Mean of every gradient over all processes, in place and in few messages; every process has to call.

    Nothing is sent before a process has all of its own gradients, so one that runs out of memory can begin its share of the
    step again without the others noticing; and forward and backward hold no communication that a graph would have to capture.
    Processes of one machine without a GPU do it in memory that they share, all others through torch.distributed.
    """

    def __init__(self, processes: int, device: torch.device) -> None:
        """Every process has to call this too. `device`: of the gradients."""
        self.processes = processes
        self.shared = Exchange.of_all(processes) if processes > 1 and device.type == "cpu" else None

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor]) -> None:
        if self.shared is None:
            average_over_processes(gradients, self.processes)
            return
        dense = [g.contiguous() for g in gradients]
        for message in cut(dense, self.processes):
            self.shared.average(pieces(dense, message))
        for gradient, averaged in zip(gradients, dense, strict=True):
            if averaged is not gradient:
                gradient.copy_(averaged)


@torch.no_grad()
def average_over_processes(gradients: Sequence[Tensor], processes: int) -> None:
    """Mean of every gradient over all processes, in place, through torch.distributed."""
    if processes < 2:
        return
    import torch.distributed as dist

    for mine in _messages(gradients):
        flat = torch._utils._flatten_dense_tensors(mine)
        dist.all_reduce(flat)
        flat /= processes
        torch._foreach_copy_(mine, list(torch._utils._unflatten_dense_tensors(flat, mine)))


class Exchange:
    """Messages of numbers between processes of one machine, each through a part of memory that it writes and all read.

    A message has a share for each process. Messages use two places in turn, so that one who is a message ahead overwrites
    nothing that another still reads.
    """

    def __init__(self, memory: CommonMemory) -> None:
        self._memory, self.rank, self.count = memory, memory.rank, len(memory.parts)
        self._parts = [torch.frombuffer(part, dtype=torch.uint8) for part in memory.parts]
        self._place = 0

    @classmethod
    def of_all(cls, processes: int) -> Exchange | None:
        """Every process has to call. None, in all of them, where they share no memory."""
        memory = CommonMemory.of_all(processes, 2 * SHARED_BYTES)
        return None if memory is None else cls(memory)

    def swap(self, message: Sequence[list[Tensor]]) -> tuple[list[Tensor], list[list[Tensor]]]:
        """This process's share of the message, and what each of the others has there; this stays until the next message."""
        self._place = 1 - self._place
        for n in range(self.count):
            if n != self.rank and n < len(message):
                torch._foreach_copy_(self._views(self.rank, n, message), message[n])
        self._memory.meet()
        if self.rank >= len(message):
            return [], []
        return message[self.rank], [self._views(n, self.rank, message) for n in range(self.count) if n != self.rank]

    def average(self, message: Sequence[list[Tensor]]) -> None:
        """The mean of all processes' numbers, everywhere: each makes that of its share, and reads the others'."""
        own, others = self.swap(message)
        if own:
            for theirs in others:
                torch._foreach_add_(own, theirs)
            torch._foreach_div_(own, self.count)
            torch._foreach_copy_(self._views(self.rank, self.rank, message), own)
        self._memory.meet()
        for n in range(self.count):
            if n != self.rank and n < len(message):
                torch._foreach_copy_(message[n], self._views(n, n, message))

    def rows_of_others(self, ids: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Every other process's rows, of which each may have another number: ids [n] int64 and rows [n, H]. What is given
        stays until the next is taken; all of it has to be."""
        width = rows.shape[1] * rows.itemsize
        most = (SHARED_BYTES - LINE) // (ids.itemsize + width)
        start, longest = 0, len(ids)
        while start == 0 or start < longest:
            self._place = 1 - self._place
            count, *own = self._row_views(self.rank, most, rows)
            count[0] = len(ids)
            some = slice(start, min(start + most, len(ids)))
            for place, values in zip(own, (ids, rows), strict=True):
                place[: len(values[some])].copy_(values[some])
            self._memory.meet()
            for n in range(self.count):
                if n != self.rank:
                    count, *theirs = self._row_views(n, most, rows)
                    longest = max(longest, int(count[0]))
                    here = max(0, min(most, int(count[0]) - start))
                    yield theirs[0][:here], theirs[1][:here]
            start += most

    def _row_views(self, process: int, most: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where a process writes how many rows it has in all, and up to `most` ids and rows of them."""
        whole = self._parts[process][self._place * SHARED_BYTES :][:SHARED_BYTES]
        count, ids, rows = whole.split([LINE, most * 8, SHARED_BYTES - LINE - most * 8])
        rows = rows[: most * like.shape[1] * like.itemsize].view(like.dtype).view(most, like.shape[1])
        return count.view(torch.int64), ids.view(torch.int64), rows

    def _views(self, process: int, number: int, message: Sequence[list[Tensor]]) -> list[Tensor]:
        """Where a process writes a share of the message."""
        dtype = message[0][0].dtype
        room = SHARED_BYTES // self.count // dtype.itemsize * dtype.itemsize
        start, share = self._place * SHARED_BYTES + number * room, message[number]
        bytes_ = self._parts[process][start : start + sum(g.nbytes for g in share)]
        return list(bytes_.view(dtype).split([len(g) for g in share]))


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


def pieces(tensors: Sequence[Tensor], message: Message) -> list[list[Tensor]]:
    """A message's shares of tensors that are in one piece each, flat."""
    return [[tensors[p.number].view(-1)[p.start : p.end] for p in share] for share in message]


def cut(tensors: Sequence[Tensor], count: int) -> list[Message]:
    """The numbers of all tensors in messages of SHARED_BYTES at most, each cut into `count` shares: as many messages as are
    needed for a dtype, and shares as even as whole lines of a cache are."""
    found: list[Message] = []
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        sizes = [(n, t.numel()) for n, t in enumerate(tensors) if t.dtype == dtype]
        line = LINE // dtype.itemsize
        most = max(1, SHARED_BYTES // count // LINE) * line
        shares = max(1, -(-sum(size for _, size in sizes) // (most * count))) * count
        even = -(-sum(size for _, size in sizes) // (shares * line)) * line
        message: Message = [[]]
        room = even
        for number, size in sizes:
            at = 0
            while at < size:
                if not room:
                    if len(message) == count:
                        found.append(message)
                        message = []
                    message.append([])
                    room = even
                end = min(size, at + room)
                message[-1].append(Piece(number, at, end))
                room -= end - at
                at = end
        if message[-1]:
            found.append(message)
    return found
