"""How many threads this process may really use: its share, not the host's cores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Where the control group trees are mounted, on every distribution and in every container runtime.
V2_MOUNTS = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
V1_MOUNTS = {
    "cpu": ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct"),
    "memory": ("sys/fs/cgroup/memory",),
}


def available_threads(root: str | Path = "/") -> int:
    """The smaller of the CPU affinity mask and the cgroup's CPU quota, at least 1.

    A quota of 2.5 CPUs gives 2: with a third thread the group would spend its quota early and be stopped for the rest
    of every period, which costs more latency than the half CPU brings. `root` is where /proc and /sys are looked for.
    """
    if hasattr(os, "sched_getaffinity"):
        threads = len(os.sched_getaffinity(0))
    else:
        threads = os.cpu_count() or 1
    quota = cgroup_cpus(root)
    if quota is not None:
        threads = min(threads, int(quota))
    return max(threads, 1)


BUSY = 20.0  # percent of the last ten seconds in which a process waited for a core


def give_way(root: str | Path = "/") -> bool:
    """Let OpenMP's threads sleep while they wait for each other, if others want this machine's cores; returns whether.

    By default they spin: on a quiet machine that saves their waking up, but beside another busy process each waits for
    one that was sent off its core, holding its own meanwhile, and a training step takes up to ten times as long. Has to
    be called before torch is imported. What the user set in OMP_WAIT_POLICY or GOMP_SPINCOUNT is left alone.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ or cpu_pressure(root) < BUSY:
        return False
    os.environ["GOMP_SPINCOUNT"] = "0"
    return True


def cpu_pressure(root: str | Path = "/") -> float:
    """Percent of the last ten seconds in which some process waited for a core; 0 where the kernel does not tell."""
    try:
        first = (Path(root) / "proc/pressure/cpu").read_text(encoding="utf-8").split("\n")[0]
        return float(dict(part.split("=") for part in first.split()[1:])["avg10"])
    except (OSError, ValueError, KeyError):
        return 0.0


def cgroup_cpus(root: str | Path = "/") -> float | None:
    """The tightest CPU quota of the process's control group and of those above it, in CPUs; None without one."""
    root = Path(root)
    quotas = [quota for folder in control_groups(root, "cpu") if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the process's control group for `controller` (cpu, memory) and of its ancestors, cgroup v2 and v1."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        mounts: tuple[str, ...]
        if number == "0" and not controllers:
            mounts = V2_MOUNTS
        elif controller in controllers.split(","):
            mounts = V1_MOUNTS[controller]
        else:
            continue
        # Inside a container the path may be the host's while the mount shows only the container's own group, so
        # folders that are not there are passed over and the mount itself is always looked at.
        inside = PurePosixPath(path.lstrip("/"))
        for mount in mounts:
            for relative in (inside, *inside.parents):
                yield root / mount / relative


def _quota(folder: Path) -> float | None:
    """CPUs that one group's quota allows; None when it sets none."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
            return None if quota == "max" else int(quota) / int(period)
        microseconds = int((folder / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        period_us = int((folder / "cpu.cfs_period_us").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return microseconds / period_us if microseconds > 0 and period_us > 0 else None
