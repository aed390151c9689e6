"""The turns of a measurement: fresh processes whose last line is the result, and which end with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import harness

BENCH = Path(__file__).resolve().parents[2] / "bench"


def script(folder: Path, text: str) -> str:
    path = folder / "turn.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


def gone(pid: int) -> bool:
    """Ended; perhaps not yet reaped by whoever adopted it."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().split()[2] == "Z"


def wait_for(holds: Callable[[], bool], seconds: float = 20) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.02)


def test_a_turn_is_a_fresh_process_and_its_last_line_is_the_result(tmp_path: Path) -> None:
    text = (
        "import json, os, sys\nprint('noise')\n"
        "print(json.dumps({'pid': os.getpid(), 'threads': os.environ['OMP_NUM_THREADS'], **json.loads(sys.argv[1])}))"
    )
    first, second = (harness.turn(sys.executable, script(tmp_path, text), {"n": n}, threads=3) for n in (1, 2))
    assert len({first["pid"], second["pid"], os.getpid()}) == 3
    assert (first["threads"], first["n"], second["n"]) == ("3", 1, 2)


def test_a_turn_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(harness.TurnFailed, match=r"exit code 1[\s\S]*ZeroDivisionError"):
        harness.turn(sys.executable, script(tmp_path, "1 / 0"), {}, threads=1)


def test_a_turn_without_a_result_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(harness.TurnFailed, match="printed no JSON: 'done"):
        harness.turn(sys.executable, script(tmp_path, "print('done')"), {}, threads=1)


def test_a_turn_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    pid = tmp_path / "child"
    text = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\ntime.sleep(300)"
    )
    for seconds in (3, 15, 75):  # until Python has come that far: seconds, on a machine that is busy
        with pytest.raises(harness.TurnFailed, match=f"still running after {seconds} s"):
            harness.turn(sys.executable, script(tmp_path, text), {}, threads=1, timeout=seconds)
        if pid.exists():
            break
    wait_for(lambda: gone(int(pid.read_text())))


def test_a_measurement_that_is_told_to_end_takes_its_turn_along(tmp_path: Path) -> None:
    pid = tmp_path / "turn"
    inner = script(tmp_path, f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(300)")
    code = (
        f"import sys; sys.path.insert(0, {str(BENCH)!r})\nimport harness\n"
        f"harness.arguments('x', rounds=1)\nharness.turn(sys.executable, {inner!r}, {{}}, threads=1)"
    )
    measurement = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_for(lambda: pid.exists() and pid.read_text() != "")
        measurement.terminate()
        assert measurement.wait(20) == 143
        wait_for(lambda: gone(int(pid.read_text())))
    finally:
        measurement.kill()


def test_a_measurement_of_turns_side_by_side_that_is_told_to_end_begins_no_other(tmp_path: Path) -> None:
    inner = script(
        tmp_path,
        "import json, os, sys, time\n"
        f"open({str(tmp_path)!r} + f'/turn-{{json.loads(sys.argv[1])[\"n\"]}}', 'w').write(str(os.getpid()))\ntime.sleep(300)",
    )
    code = (
        f"import sys; sys.path.insert(0, {str(BENCH)!r})\nimport harness\nharness.arguments('x', rounds=1)\n"
        f"go = lambda n: harness.turn(sys.executable, {inner!r}, {{'n': n}}, threads=1)\nharness.side_by_side(go, range(4), 2)"
    )
    measurement = subprocess.Popen([sys.executable, "-c", code])
    turns = [tmp_path / f"turn-{n}" for n in range(4)]
    try:
        wait_for(lambda: all(turn.exists() and turn.read_text() for turn in turns[:2]))
        measurement.terminate()
        assert measurement.wait(20) == 143
        wait_for(lambda: all(gone(int(turn.read_text())) for turn in turns[:2]))
        assert not turns[2].exists() and not turns[3].exists()
    finally:
        measurement.kill()


def test_what_is_done_side_by_side_comes_in_its_order() -> None:
    def slow_at_first(n: int) -> int:
        time.sleep(0.2 if n == 0 else 0.0)
        return 10 * n

    assert [harness.side_by_side(slow_at_first, range(4), n) for n in (1, 3)] == [[0, 10, 20, 30]] * 2


def test_a_peer_does_not_see_our_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "ENVIRONMENTS", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "ours"))
    peer = tmp_path / "python"
    peer.symlink_to(sys.executable)
    text = "import json, os\nprint(json.dumps({'path': os.environ.get('PYTHONPATH')}))"
    assert harness.turn(peer, script(tmp_path, text), {}, threads=1) == {"path": None}
    assert harness.turn(sys.executable, script(tmp_path, text), {}, threads=1)["path"] == str(tmp_path / "ours")
