"""What this machine is and what share of it is ours."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import signal
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from regraft.engine.threads import available_threads

PR_SET_PDEATHSIG = 1  # linux/prctl.h


@cache
def cpu_flags() -> frozenset[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


def cpu_has_bf16() -> bool:
    """Whether bf16 products run in hardware on this CPU; without it they are several times slower than fp32."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def describe() -> str:
    """CPU model and cores, or the GPU's name, for reports."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    return f"{name}, {available_threads()} cores"


def seconds_since_process_start() -> float:
    """Wall-clock seconds since the operating system started this process: imports are part of a start."""
    import os
    import time

    try:
        # By the clock that starts with the machine: psutil's is off by up to a second, for the kernel tells the time
        # of its start in whole seconds.
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # no Linux
        import psutil

        return time.time() - psutil.Process().create_time()


@contextlib.contextmanager
def start_without_collector() -> Iterator[None]:
    """No garbage collector while torch and transformers are imported: it would walk a million new objects over and
    over, for an eighth of a start, and find nothing. They are left out of later walks too, until `thaw`."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def thaw() -> None:
    """Let the collector see again what a start has left out: a process may train many models."""
    gc.unfreeze()


def end_with(parent: int) -> None:
    """Let this process be killed when its parent has ended, however that ended. Linux only."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os.kill(os.getpid(), signal.SIGKILL)


def versions(*more: str) -> dict[str, str]:
    """Versions of what decides the numbers, of `more` packages too."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("regraft", "torch", "transformers", "accelerate", "tokenizers", "numpy", "onnxruntime", *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
