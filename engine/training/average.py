"""Gradients of several processes, averaged once a step."""

from __future__ import annotations

import mmap
import os
import platform
import secrets
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from regraft.engine.training.together import agreed, wait_until

MESSAGE_BYTES = 32 << 20  # enough that a network's latency does not show, and little beside the gradients
Address = tuple[str, int, str, bytes]  # of memory: where the rest holds, whose it is, its path, and its last bytes
SHARED_BYTES = 8 << 20  # of a message in shared memory: it stays in the processor's caches
COUNT_BYTES = 64  # a cache line
# Here what a process writes is seen by others in the order in which it was written.
IN_ORDER = platform.machine() in ("x86_64", "AMD64")


class Average:
    """Mean of every gradient over all processes, in place and in few messages; every process has to call.

    Nothing is sent before a process has all of its own gradients, so one that runs out of memory can begin its share of the
    step again without the others noticing; and forward and backward hold no communication that a graph would have to capture.
    Processes of one machine without a GPU do it in memory that they share, all others through torch.distributed.
    """

    def __init__(self, processes: int, device: torch.device) -> None:
        """Every process has to call this too. `device`: of the gradients."""
        self.processes = processes
        self._shared = _Shared.of_all(processes) if processes > 1 and device.type == "cpu" else None

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor]) -> None:
        if self._shared is None:
            average_over_processes(gradients, self.processes)
            return
        dense = [g.contiguous() for g in gradients]
        for message in _shares(dense, self.processes):
            self._shared.average(message)
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


class _Shared:
    """Memory of all processes of one machine: each has a part that it writes and all read.

    A message has a share for each process. Each writes those of the others to its part, averages its own over what they
    wrote, writes that too, and reads the others'. Messages use two places in turn, so that one who is a message ahead
    overwrites nothing that another still reads. How often it has met the others each counts behind its part: a barrier
    through sockets takes up to a millisecond where all processors are at work, and there are two for a message.
    """

    def __init__(self, parts: list[mmap.mmap], owners: list[int], rank: int) -> None:
        """`owners`: process ids, by rank."""
        self._parts = [torch.frombuffer(part, dtype=torch.uint8, count=2 * SHARED_BYTES) for part in parts]
        self._counts = [memoryview(part)[2 * SHARED_BYTES :][:8].cast("Q") for part in parts]
        self._owners, self._rank, self._place = owners, rank, 0

    @classmethod
    def of_all(cls, processes: int) -> _Shared | None:
        """Every process has to call. None, in all of them, where one of them cannot see the memory of all others."""
        import torch.distributed as dist

        mark = secrets.token_bytes(16)
        own: tuple[int, mmap.mmap] | None = None
        try:
            own = _made(2 * SHARED_BYTES + COUNT_BYTES + len(mark))
            own[1][-len(mark) :] = mark
            address: Address | None = (_where(), os.getpid(), f"/proc/{os.getpid()}/fd/{own[0]}", mark)
        except (OSError, AttributeError):  # no such memory, or not on this system
            address = None
        addresses: list[Address | None] = [None] * processes
        dist.all_gather_object(addresses, address)
        seen = [_seen(some) for some in addresses]
        everywhere = agreed(float(all(part is not None for part in seen)), "smallest") == 1.0
        if own is not None:
            os.close(own[0])  # all that could open it have done so
        if not everywhere:
            return None
        owners = [some[1] for some in addresses if some is not None]
        return cls([part for part in seen if part is not None], owners, dist.get_rank())

    def meet(self) -> None:
        """Wait until all processes have come here as often as this one."""
        if not IN_ORDER:
            torch.distributed.barrier()
            return
        count = self._counts[self._rank][0] = self._counts[self._rank][0] + 1

        def is_here(rank: int) -> bool:
            return self._counts[rank][0] >= count

        for rank, owner in enumerate(self._owners):
            if not is_here(rank):
                wait_until(partial(is_here, rank), owner)

    def average(self, message: Sequence[list[Tensor]]) -> None:
        count, dtype = len(self._parts), message[0][0].dtype
        place, room = self._place * SHARED_BYTES, SHARED_BYTES // count // dtype.itemsize * dtype.itemsize
        self._place = 1 - self._place

        def views(process: int, number: int) -> list[Tensor]:
            """Where a process writes a share of the message."""
            start, share = place + number * room, message[number]
            bytes_ = self._parts[process][start : start + sum(g.nbytes for g in share)]
            return list(bytes_.view(dtype).split([len(g) for g in share]))

        others = [n for n in range(count) if n != self._rank]
        for n in others:
            if n < len(message):
                torch._foreach_copy_(views(self._rank, n), message[n])
        self.meet()
        if self._rank < len(message):
            own = message[self._rank]
            for n in others:
                torch._foreach_add_(own, views(n, self._rank))
            torch._foreach_div_(own, count)
            torch._foreach_copy_(views(self._rank, self._rank), own)
        self.meet()
        for n in others:
            if n < len(message):
                torch._foreach_copy_(message[n], views(n, n))


def _made(size: int) -> tuple[int, mmap.mmap]:
    """Memory that other processes can open by this file descriptor. OSError where there is not enough."""
    file = os.memfd_create("regraft gradients")
    try:
        os.posix_fallocate(file, 0, size)
        return file, mmap.mmap(file, size)
    except OSError:
        os.close(file)
        raise


def _where() -> str:
    """Where numbers of processes mean the same: this start of this machine, and this container."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii") + str(
        Path("/proc/self/ns/pid").readlink()
    )


def _seen(address: Address | None) -> mmap.mmap | None:
    """The memory at an address; None where this process cannot see it, on another machine or in another container."""
    if address is None:
        return None
    where, _, path, mark = address
    try:
        if where != _where():
            return None
        file = os.open(path, os.O_RDWR)
        try:
            found = mmap.mmap(file, 2 * SHARED_BYTES + COUNT_BYTES + len(mark))
        finally:
            os.close(file)
    except (OSError, ValueError):
        return None
    return found if found[-len(mark) :] == mark else None


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


def _shares(gradients: Sequence[Tensor], count: int) -> Iterator[list[list[Tensor]]]:
    """The numbers of all gradients of one dtype in messages of SHARED_BYTES, each cut into `count` shares; the last may
    have fewer."""
    for dtype in dict.fromkeys(g.dtype for g in gradients):
        message: list[list[Tensor]] = [[]]
        room = most = SHARED_BYTES // count // dtype.itemsize
        for gradient in (g.view(-1) for g in gradients if g.dtype == dtype):
            at = 0
            while at < len(gradient):
                if not room:
                    if len(message) == count:
                        yield message
                        message = []
                    message.append([])
                    room = most
                message[-1].append(gradient[at : at + room])
                at += len(message[-1][-1])
                room -= len(message[-1][-1])
        if message[-1]:
            yield message
