"""What the C library holds of freed memory on a CPU: kept from step to step for speed, given back when it is too much."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

GROWTH, AT_LEAST = 0.1, 64 << 20  # of what is resident after a step, and bytes
EVERY = 32  # steps at least, for the next one maps its pages anew: 70 ms for MiniLM


@cache
def _libc() -> Any:
    """glibc; None where the C library is another one."""
    try:
        library = ctypes.CDLL("libc.so.6")
        library.mallopt, library.malloc_trim  # noqa: B018 - AttributeError where there are none
    except (OSError, AttributeError):
        return None
    return library


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory for the next step: returned to the system, 90 MB of gradients and all activations
    would be mapped and zeroed again page by page in every step. False where the C library is another one."""
    trim_threshold, mmap_max = -1, -4  # names in malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX
    libc = _libc()
    return libc is not None and bool(libc.mallopt(mmap_max, 0)) and bool(libc.mallopt(trim_threshold, 2**31 - 1))


class FreedMemory:
    """Gives freed memory back when it has grown beyond what a step needs.

    Steps differ in size, so what is freed is cut ever smaller by what stays, and new blocks go to pages that were not in
    use before: a LoRA run of MiniLM held 1.6 GB after 4,210 steps and a QLoRA run 2.8 GB, where their first ones peak at 0.9 and 1.0.
    """

    def __init__(self) -> None:
        self._needed: int | None = None
        self._steps = 0

    def after_step(self) -> None:
        """To be called after each step; the first one after memory was given back tells what a step needs."""
        self._steps += 1
        if self._needed is None:
            self._needed = resident()
        elif self._steps % EVERY == 0 and resident() > self._needed + max(AT_LEAST, GROWTH * self._needed):
            self.give_back()

    def give_back(self) -> None:
        """Give back every page that holds nothing, within the heap too."""
        if (libc := _libc()) is not None:
            libc.malloc_trim(0)
        self._needed, self._steps = None, 0


def resident() -> int:
    """Bytes of this process in memory."""
    import psutil

    return int(psutil.Process().memory_info().rss)
