from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from regraft.engine.threads import available_threads, cgroup_cpus, give_way


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A file tree as /proc and /sys would show it."""
    for name, content in {"proc/self/cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    return root


def test_the_affinity_mask_of_the_process_limits_the_threads() -> None:
    one = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{one}}});"
        "from regraft.engine.threads import available_threads; print(available_threads())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_without_any_quota_the_affinity_mask_decides(tmp_path: Path) -> None:
    assert available_threads(tmp_path) == len(os.sched_getaffinity(0))


def test_a_version_2_quota_is_read(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/app", {"sys/fs/cgroup/app/cpu.max": "350000 100000"})
    assert cgroup_cpus(root) == 3.5


def test_the_tightest_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/cpu.max": "max 100000",
        "sys/fs/cgroup/pods/cpu.max": "200000 100000",
        "sys/fs/cgroup/pods/app/cpu.max": "800000 100000",
    }
    assert cgroup_cpus(machine(tmp_path, "0::/pods/app", files)) == 2.0


def test_a_group_named_as_the_host_sees_it_falls_back_to_the_mount(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/docker/0a1b2c", {"sys/fs/cgroup/cpu.max": "100000 50000"})
    assert cgroup_cpus(root) == 2.0


def test_a_version_1_quota_is_read(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_quota_us": "150000",
        "sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_period_us": "100000",
    }
    assert cgroup_cpus(machine(tmp_path, "4:memory:/other\n3:cpu,cpuacct:/app\n0::/", files)) == 1.5


@pytest.mark.parametrize("quota", ["max 100000", "nonsense"])
def test_a_group_without_a_quota_sets_no_limit(tmp_path: Path, quota: str) -> None:
    assert cgroup_cpus(machine(tmp_path, "0::/", {"sys/fs/cgroup/cpu.max": quota})) is None


def test_an_unlimited_version_1_group_sets_no_limit(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}
    assert cgroup_cpus(machine(tmp_path, "1:cpu:/", files)) is None


@pytest.mark.parametrize(("quota", "threads"), [("190000 100000", 1), ("20000 100000", 1), ("100000 100000", 1)])
def test_a_part_of_a_cpu_is_no_thread_but_there_is_always_one(tmp_path: Path, quota: str, threads: int) -> None:
    assert available_threads(machine(tmp_path, "0::/", {"sys/fs/cgroup/cpu.max": quota})) == threads


@pytest.mark.parametrize(
    ("pressure", "own", "gives_way"),
    [
        ("some avg10=99.49 avg60=9.57 avg300=1.81 total=3782645662\nfull avg10=0.00 avg60=0.00\n", {}, True),
        ("some avg10=0.30 avg60=99.00 avg300=97.81 total=3782645662\n", {}, False),
        ("some avg10=99.49 avg60=9.57 avg300=1.81 total=1\n", {"GOMP_SPINCOUNT": "7"}, False),
        ("some avg10=99.49 avg60=9.57 avg300=1.81 total=1\n", {"OMP_WAIT_POLICY": "ACTIVE"}, False),
        (None, {}, False),
    ],
)
def test_waiting_threads_sleep_where_others_want_the_cores(tmp_path, monkeypatch, pressure, own, gives_way):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    if pressure is not None:
        (tmp_path / "proc/pressure").mkdir(parents=True)
        (tmp_path / "proc/pressure/cpu").write_text(pressure)
    try:
        assert give_way(tmp_path) is gives_way
        assert os.environ.get("GOMP_SPINCOUNT") == ("0" if gives_way else own.get("GOMP_SPINCOUNT"))
    finally:
        if gives_way:
            del os.environ["GOMP_SPINCOUNT"]
