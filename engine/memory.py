"""How much memory this process may still take: what its control group allows, not what the host has."""

from __future__ import annotations

from pathlib import Path

from regraft.engine.threads import control_groups

# By version of control groups: the limit, what is used, and what of that is cached files, given back when it is needed.
NAMES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def host_memory(root: str | Path = "/") -> int:
    """Bytes free: the machine's, or less where a control group's limit comes first. `root`: where /proc and /sys are."""
    import psutil

    free = psutil.virtual_memory().available
    allowed = cgroup_memory(root)
    return free if allowed is None else min(free, allowed)


def cgroup_memory(root: str | Path = "/") -> int | None:
    """Bytes that the process's control group and those above it leave free; None without a limit."""
    left = [free for folder in control_groups(Path(root), "memory") if (free := _left(folder)) is not None]
    return min(left, default=None)


def _left(folder: Path) -> int | None:
    for limit, used, cached in NAMES:
        try:
            text = (folder / limit).read_text(encoding="utf-8").strip()
            if text == "max":
                return None
            taken = int((folder / used).read_text(encoding="utf-8")) - _of_stat(folder, cached)
            return max(0, int(text) - taken)  # version 1 says "none" as a number beyond any machine's memory
        except (OSError, ValueError):
            continue
    return None


def _of_stat(folder: Path, key: str) -> int:
    try:
        lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [key]), 0)
