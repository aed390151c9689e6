"""What this machine is and what share of it is ours."""

from __future__ import annotations

import math
import os
import platform
from functools import cache
from pathlib import Path


def available_threads(root: Path = Path("/")) -> int:
    """CPUs this process may use: its affinity, cut down to the control group's quota; at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(root)
    return max(1, min(affinity, math.ceil(quota)) if quota else affinity)


def _quota(root: Path) -> float | None:
    """CPUs that the tightest control group above this process allows; None without a limit."""
    found = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base = root / "sys/fs/cgroup" / ("cpu" if "cpu" in controllers.split(",") else "")
        for folder in [base / path.lstrip("/"), *(base / path.lstrip("/")).parents]:
            found += _limits(folder)
            if folder == base:
                break
    return min(found) if found else None


def _limits(folder: Path) -> list[float]:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return [] if quota == "max" else [int(quota) / int(period)]
    except (OSError, ValueError):
        pass
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return [] if quota <= 0 else [quota / int((folder / "cpu.cfs_period_us").read_text())]
    except (OSError, ValueError):
        return []


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
    try:
        name = next(
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        )
    except (OSError, StopIteration):
        pass
    return f"{name}, {available_threads()} cores"


def seconds_since_process_start() -> float:
    """Wall-clock seconds since the operating system started this process: imports are part of a start."""
    import time

    import psutil

    return time.time() - psutil.Process().create_time()


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("regraft", "torch", "transformers", "accelerate", "tokenizers", "numpy", "onnxruntime"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
