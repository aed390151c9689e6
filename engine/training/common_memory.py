"""Memory that all processes of one machine see."""

from __future__ import annotations

import mmap
import os
import platform
import secrets
from functools import partial
from pathlib import Path

import torch

from regraft.engine.training.together import agreed, wait_until

Address = tuple[str, int, str, bytes, int]  # where the rest holds, whose it is, its path, its last bytes, and its size
COUNT_BYTES = 64  # a cache line
MARK_BYTES = 16
# Here what a process writes is seen by others in the order in which it was written.
IN_ORDER = platform.machine() in ("x86_64", "AMD64")


class CommonMemory:
    """A part of each process, which all of them read and write: `parts`, by rank.

    How often it has met the others each counts behind its part: a barrier through sockets takes up to a millisecond where all
    processors are at work.
    """

    def __init__(self, maps: list[mmap.mmap], owners: list[int], rank: int) -> None:
        """`owners`: process ids, by rank."""
        self.parts, self.rank = [memoryview(part)[: -COUNT_BYTES - MARK_BYTES] for part in maps], rank
        self._counts = [memoryview(part)[-COUNT_BYTES - MARK_BYTES :][:8].cast("Q") for part in maps]
        self._owners = owners

    @classmethod
    def of_all(cls, processes: int, size: int) -> CommonMemory | None:
        """With `size` bytes of this process. Every process has to call. None, in all of them, where one of them cannot see
        the memory of all others."""
        import torch.distributed as dist

        mark = secrets.token_bytes(MARK_BYTES)
        own: tuple[int, mmap.mmap] | None = None
        try:
            own = _made(size + COUNT_BYTES + MARK_BYTES)
            own[1][-MARK_BYTES:] = mark
            address: Address | None = (_where(), os.getpid(), f"/proc/{os.getpid()}/fd/{own[0]}", mark, len(own[1]))
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
        count = self._counts[self.rank][0] = self._counts[self.rank][0] + 1

        def is_here(rank: int) -> bool:
            return self._counts[rank][0] >= count

        for rank, owner in enumerate(self._owners):
            if not is_here(rank):
                wait_until(partial(is_here, rank), owner)


def _made(size: int) -> tuple[int, mmap.mmap]:
    """Memory that other processes can open by this file descriptor. OSError where there is not enough."""
    file = os.memfd_create("regraft")
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
    where, _, path, mark, size = address
    try:
        if where != _where():
            return None
        file = os.open(path, os.O_RDWR)
        try:
            found = mmap.mmap(file, size)
        finally:
            os.close(file)
    except (OSError, ValueError):
        return None
    return found if found[-len(mark) :] == mark else None
