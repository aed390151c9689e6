"""What a measurement was taken on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

# Instruction sets that decide which arithmetic is fast: bf16 products, int8 dot products, wide vectors.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8", "bf16", "i8mm", "asimddp")
PRECISIONS = ("fp32", "bf16")


def facts() -> dict[str, Any]:
    """CPU, cores, instruction sets, memory, GPU and load, for the JSON of a result."""
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "flags": cpu_flags(),
        "memory_gb": round(memory_bytes() / 2**30, 1),
        "gpu": gpu_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def cores() -> int:
    """CPU cores this process may use: its affinity and its container's quota, whichever is less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota(Path("/sys/fs/cgroup"))
    return max(1, min(allowed, int(quota)) if quota else allowed)


def cgroup_quota(root: Path) -> float | None:
    """CPUs granted by a cgroup folder, version 2 or 1; None without a limit."""
    try:
        if (root / "cpu.max").exists():
            quota, period = (root / "cpu.max").read_text().split()[:2]
            return None if quota == "max" else int(quota) / int(period)
        quota = int((root / "cpu/cpu.cfs_quota_us").read_text())
        period = int((root / "cpu/cpu.cfs_period_us").read_text())
        return quota / period if quota > 0 else None
    except (OSError, ValueError):
        return None


def cpu_model() -> str:
    names = _cpuinfo("model name")
    return names or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Those of FLAGS that the CPU has."""
    found = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return [flag for flag in FLAGS if flag in found]


def precision() -> str:
    """What a measurement computes in here where nothing is said."""
    return "bf16" if has_fast_bf16() else "fp32"


def has_fast_bf16() -> bool:
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(cpu_flags()))


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpu_name() -> str | None:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    names = answer.splitlines()
    return f"{len(names)} x {names[0]}" if names else None


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
